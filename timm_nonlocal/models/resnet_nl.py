"""ImageNet networks of timm with a nonlocal stage inside, on timm's own pretrained weights."""

from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import Tensor, nn

from ..layers.insertion import insert

__all__ = ['resnet50_nl_proposed_k5']

_a1_in1k: Any = get_pretrained_cfg('resnet50.a1_in1k')
default_cfgs = generate_default_cfgs({'resnet50_nl_proposed_k5.a1_in1k': _a1_in1k})  # timm looks for this very name


def _resnet50_nl(nl_args: dict[str, Any] | None = None, **kwargs: Any) -> nn.Module:
    """ResNet-50 with a nonlocal module before the last unit of its third stage, as in Wang et al. (CVPR 2018)."""
    model = timm.create_model('resnet50', **kwargs)
    weight = model.get_parameter('conv1.weight')
    example = weight.new_zeros(1, weight.shape[1], 32, 32)
    return insert(model, 'layer3.4', **{'kind': 'proposed', 'k': 5, **(nl_args or {})}, example=example,
                  channels_last=False)


def _keep_nonlocal(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a file, and the model's own nonlocal module where the file has none, as timm's have not."""
    if any('.nl.' in key for key in state_dict):
        return state_dict
    return {**{key: tensor for key, tensor in model.state_dict().items() if '.nl.' in key}, **state_dict}


@register_model
def resnet50_nl_proposed_k5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's ResNet-50 with a proposed stage of 5 sub-blocks that starts as the identity."""
    return build_model_with_cfg(
        _resnet50_nl, 'resnet50_nl_proposed_k5', pretrained, pretrained_filter_fn=_keep_nonlocal, **kwargs)
