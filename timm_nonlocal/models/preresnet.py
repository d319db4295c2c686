"""CIFAR PreResNets of depth 9n+2 with nonlocal modules, and the names they are registered under.

Backbone: the bottleneck pre-activation ResNet of He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks"
(ECCV 2016), as its authors' CIFAR code builds it. Nonlocal modules: Tao, Sun, Du, Liu, "Nonlocal Neural Networks,
Nonlocal Diffusion and Nonlocal Modeling" (NeurIPS 2018), right after the second unit of a stage.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, checkpoint_seq, register_model
from torch import Tensor, nn
from torch.types import Device

from ..layers.blocks import KINDS
from . import pretrained as tags

__all__ = ['ARCHITECTURES', 'SMALLEST', 'PreResNet']

SMALLEST = 4  # pixels a side


@torch.fx.wrap
def _large_enough(x: Tensor) -> Tensor:
    """Images (B, in_chans, H, W), as they came. Raises ValueError if they are too small for the total stride of 4."""
    if not torch.jit.is_scripting():
        _measure(x)
    return x


@torch.jit.ignore
def _measure(x: Tensor) -> None:
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and min(x.shape[-2:]) < SMALLEST:
        raise ValueError(f'an image of {x.shape[-2]}×{x.shape[-1]} pixels is too small: '
                         f'PreResNet takes {SMALLEST}×{SMALLEST} and larger')


class Bottleneck(nn.Module):
    """Pre-activation bottleneck: BN-ReLU before each convolution, the stride on the first 1×1.

    Where the width changes, the first BN-ReLU serves both branches and the shortcut is a 1×1 convolution without BN.
    """

    expansion = 4

    def __init__(self, in_chs: int, width: int, stride: int = 1, device: Device = None,
                 dtype: Optional[torch.dtype] = None):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        out_chs = width * self.expansion
        self.bn1 = nn.BatchNorm2d(in_chs, **dd)
        self.conv1 = nn.Conv2d(in_chs, width, 1, stride, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(width, **dd)
        self.conv3 = nn.Conv2d(width, out_chs, 1, bias=False, **dd)
        changes = stride != 1 or in_chs != out_chs
        self.downsample = nn.Conv2d(in_chs, out_chs, 1, stride, bias=False, **dd) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        y = self.conv2(F.relu(self.bn2(y)))
        y = self.conv3(F.relu(self.bn3(y)))
        return shortcut + y


class PreResNet(nn.Module):
    """Bottleneck PreResNet for 32×32 images, with original blocks or a proposed stage where asked.

    Args:
        depth: 9n+2, n units a stage.
        nl: 'original' (eq. (1)), 'proposed' (eq. (8)) or None for the plain backbone.
        nl_k: the number of blocks or sub-blocks at each place.
        nl_stages: the stages, counted from 1, whose second unit is followed by a nonlocal module.
        nl_args: further arguments of `NonlocalBlock` or `NonlocalStage`, such as {'affinity': 'uniform'}.
        num_classes: 0 leaves the classifier out.
        in_chans: channels of the image.
        global_pool: 'avg', any other of timm's pooling types, or '' for none, which goes with num_classes=0.
        drop_rate: dropout in front of the classifier.

    Raises:
        ValueError: a depth that is not 9n+2 or has no second unit, nonlocal arguments that do not fit, or a classifier
            without pooling.

    Example:
        >>> model = PreResNet(20, nl='proposed', nl_k=5, nl_args={'affinity': 'dot_product'})
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> len(model.layer1.nl.sub_blocks)
        5
    """

    if TYPE_CHECKING:  # TorchScript must not see them
        layer1: nn.Sequential
        layer2: nn.Sequential
        layer3: nn.Sequential

    def __init__(
            self,
            depth: int = 20,
            nl: Optional[str] = None,
            nl_k: int = 1,
            nl_stages: Sequence[int] = (1,),
            nl_args: Optional[dict[str, Any]] = None,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.0,
            device: Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        units = (depth - 2) // 9
        if units < 1 or depth != 9 * units + 2:
            raise ValueError(f'depth={depth} is not 9n+2: use 11, 20, 29, 56, …')
        if nl is not None and nl not in KINDS:
            raise ValueError(f'nl={nl!r} is unknown: use one of {", ".join(KINDS)}, or None')
        if nl is None and (nl_args or nl_k != 1 or [*nl_stages] != [1]):
            raise ValueError(f'nl_k={nl_k}, nl_stages={list(nl_stages)} and nl_args={nl_args!r} are of a nonlocal '
                             f'module: use nl={" or ".join(map(repr, KINDS))} too')
        if nl is not None and (units < 2 or not nl_stages or not set(nl_stages) <= {1, 2, 3}):
            raise ValueError(f'a nonlocal module follows the second unit of stages 1, 2 or 3: '
                             f'depth={depth} has {units} a stage, nl_stages={list(nl_stages)}')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        chs = 16
        self.conv1 = nn.Conv2d(in_chans, chs, 3, padding=1, bias=False, **dd)
        self.feature_info: list[dict[str, Any]] = [dict(num_chs=chs, reduction=1, module='conv1')]
        for stage, width in enumerate((16, 32, 64), start=1):
            layer: OrderedDict[str, nn.Module] = OrderedDict()
            for unit in range(units):
                layer[str(unit)] = Bottleneck(chs, width, 2 if stage > 1 and unit == 0 else 1, **dd)
                chs = width * Bottleneck.expansion
                if nl is not None and stage in nl_stages and unit == 1:
                    layer['nl'] = KINDS[nl](chs, nl_k, **(nl_args or {}), **dd)
            self.add_module(f'layer{stage}', nn.Sequential(layer))
            self.feature_info.append(dict(num_chs=chs, reduction=2 ** (stage - 1), module=f'layer{stage}'))
        self.norm: nn.Module = nn.BatchNorm2d(chs, **dd)
        self.act: nn.Module = nn.ReLU()

        self.num_features = chs
        self._set_head(num_classes, global_pool, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """He fan-out for the convolutions; nonlocal modules and the classifier draw their own weights."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def _set_head(self, num_classes: int, pool: str, device: Device = None,
                  dtype: Optional[torch.dtype] = None) -> None:
        if num_classes and not pool:
            raise ValueError(f"num_classes={num_classes} with global_pool='': a classifier reads pooled features; use "
                             f"num_classes=0, or a pooling such as global_pool='avg'")
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = linear = nn.Linear(self.head_hidden_size, num_classes, device=device, dtype=dtype)
            nn.init.zeros_(linear.bias)
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers, as timm's layer-wise learning rates want them."""
        return dict(stem=r'^conv1', blocks=r'^layer(\d+)' if coarse else [
            (r'^layer(\d+)\.(\d+)', None),
            (r'^layer(\d+)\.nl', (1,)),  # with the unit it follows
            (r'^norm', (99999,)),
        ])

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """No parameter is exempt: the paper decays all of them."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes every unit in the backward pass, which then also updates the BN statistics a second time."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier, or the identity where there is none."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replaces the classifier, and the pooling unless global_pool is None; 0 classes or '' leave one out.

        Where there was no pooling and none is asked for, classes come with average pooling.
        """
        weight = next(self.parameters())
        if global_pool is None:
            global_pool = self.global_pool.pool_type or ('avg' if num_classes else '')
        self._set_head(num_classes, global_pool, weight.device, weight.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to features (B, 256, ⌈H/4⌉, ⌈W/4⌉), after the final BN-ReLU."""
        x = self.conv1(_large_enough(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        else:
            x = self.layer3(self.layer2(self.layer1(x)))
        return self.act(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (B, 256, h, w) to logits (B, num_classes), or to what the classifier reads."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def _take_indices(self, indices: Optional[Union[int, list[int]]]) -> list[int]:
        """Positions in `feature_info`: the last n if an int, all if None, else those listed (negative from the end)."""
        levels = list(range(len(self.feature_info)))
        if indices is None:
            return levels
        wanted = range(-indices, 0) if isinstance(indices, int) else indices
        if not wanted or not all(-len(levels) <= index < len(levels) for index in wanted):
            raise ValueError(f'indices={wanted!r}: there are {len(levels)} levels, {levels}')
        return [levels[index] for index in wanted]

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, list[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[list[Tensor], tuple[Tensor, list[Tensor]]]:
        """The stem's and the stages' outputs (`feature_info`), before the final BN-ReLU unless norm is set.

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n if an int, all if None, else those listed (negative from the end).
            norm: apply the final BN-ReLU to the last stage's output, the only one it fits.
            stop_early: stop after the last one asked for.
            output_fmt: 'NCHW'.
            intermediates_only: return the list alone.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt={output_fmt!r}: only 'NCHW' is made")
        take = self._take_indices(indices)
        last = max(take)
        x = self.conv1(_large_enough(x))
        intermediates = [x] if 0 in take else []
        for index in range(1, last + 1 if stop_early else 4):
            layer = getattr(self, f'layer{index}')
            x = checkpoint_seq(layer, x) if self.grad_checkpointing else layer(x)
            if index in take:
                intermediates.append(self.act(self.norm(x)) if norm and index == 3 else x)
        if intermediates_only:
            return intermediates
        return (self.act(self.norm(x)) if last == 3 or not stop_early else x), intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, list[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drops the stages after the last index asked for, and the final BN-ReLU and the head where told to."""
        take = self._take_indices(indices)
        last = max(take)
        for index in range(last + 1, 4):
            setattr(self, f'layer{index}', nn.Sequential())
        if prune_norm or last < 3:
            self.norm, self.act = nn.Identity(), nn.Identity()
        if last < 3:
            self.num_features = self.feature_info[last]['num_chs']
        if prune_head or last < 3:
            self.reset_classifier(0, '')
        return take


def _architectures() -> dict[str, dict[str, Any]]:
    """Every registered name with the arguments of its PreResNet."""
    nets: dict[str, dict[str, Any]] = {}
    for depth in (20, 56):
        name = f'preresnet{depth}'
        nets[name] = dict(depth=depth)
        for nl, most in (('original', 4), ('proposed', 6)):
            for k in range(1, most + 1):
                nets[f'{name}_nl_{nl}_k{k}'] = dict(depth=depth, nl=nl, nl_k=k)
            nets[f'{name}_nl_{nl}_k1x3'] = dict(depth=depth, nl=nl, nl_stages=(1, 2, 3))
    return nets


ARCHITECTURES = _architectures()
default_cfgs = tags.default_cfgs({  # timm looks for this very name
    name: 'cifar10' if args['depth'] == 20 else 'cifar100' for name, args in ARCHITECTURES.items()})  # as in the paper


def _entrypoint(name: str, model_args: dict[str, Any]) -> Callable[..., Any]:
    def create(pretrained: bool = False, **kwargs: Any) -> PreResNet:
        if pretrained:
            tags.require_weights(name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        return build_model_with_cfg(
            PreResNet, name, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3)), **{**model_args, **kwargs})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = 'PreResNet-{depth}'.format(**model_args) + ''.join(
        f', {key}={value}' for key, value in model_args.items() if key != 'depth')
    return register_model(create)


for _name, _args in ARCHITECTURES.items():
    globals()[_name] = _entrypoint(_name, _args)
