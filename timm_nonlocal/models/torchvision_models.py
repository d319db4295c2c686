"""The PreResNets in torchvision's registry: `torchvision.models.get_model(name, weights='DEFAULT')`.

Each has a `WeightsEnum`, such as `PreResNet20_NL_Proposed_K5_Weights.CIFAR10`, with a member for every tag that has
weights; they are the same weights as timm's. torchvision finds an enum by its name in `torchvision.models` alone, so
that is where the enums are put.
"""

from functools import partial
from pathlib import Path
from typing import Any

import timm
import torchvision.models
from huggingface_hub import hf_hub_url
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn
from torchvision.models._api import BUILTIN_MODELS, Weights, WeightsEnum, register_model
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from ..datasets import DATASETS
from .preresnet import ARCHITECTURES, SMALLEST
from .pretrained import INDEX, TAGS


class PreResNetWeights(WeightsEnum):
    """torchvision's enum of weights, loaded as timm loads them."""

    def get_state_dict(self, progress: bool = True, check_hash: bool = False) -> dict[str, Tensor]:
        """All tensors by name; the arguments are torchvision's and change nothing."""
        return timm.create_model(self.meta['timm_name'], pretrained=True).state_dict()


def _weights(name: str, tag: str, cfg: PretrainedCfg) -> Weights:
    """What torchvision wants to know of the weights `<architecture>.<tag>`."""
    known, data = INDEX.get(name, {}), DATASETS[TAGS[tag].dataset]
    meta: dict[str, Any] = {'timm_name': name, 'architecture': 'PreResNet', 'categories': list(data.labels),
            'min_size': (SMALLEST, SMALLEST)}
    if 'recipe' in known:  # else only where the weights are is known
        meta |= {
            'num_params': known['num_params'], '_ops': known['macs'] / 1e9, 'recipe': known['recipe'],
            '_metrics': {data.title: {'acc@1': round(100 - known['test_error'], 2)}}}
    return Weights(
        url=Path(cfg.file).as_uri() if cfg.file else hf_hub_url(str(cfg.hf_hub_id), 'model.safetensors'),
        transforms=partial(ImageClassification, crop_size=cfg.input_size[-1], resize_size=cfg.input_size[-1],
                           mean=cfg.mean, std=cfg.std, interpolation=InterpolationMode(cfg.interpolation)),
        meta=meta)


def _weights_enum(architecture: str) -> type[WeightsEnum]:
    """The enum of an architecture: a member for each tag with weights, and DEFAULT where the default tag has some."""
    title = '_'.join({'nl': 'NL'}.get(word, word.capitalize()) for word in architecture.split('_'))
    members = {}
    for tag in TAGS:
        cfg = get_pretrained_cfg(f'{architecture}.{tag}')
        if cfg and cfg.has_weights:
            members[tag.upper()] = _weights(f'{architecture}.{tag}', tag, cfg)
    default = get_pretrained_cfg(architecture)
    if default and (member := members.get(str(default.tag).upper())):
        members['DEFAULT'] = member
    return PreResNetWeights(f'{title.replace("Preresnet", "PreResNet")}_Weights', members, module=__name__)


def _register(architecture: str, enum: type[WeightsEnum]) -> None:
    def build(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> nn.Module:
        try:
            weights = enum.verify(weights)
        except KeyError:
            found = ', '.join(enum.__members__) or 'none so far'
            raise ValueError(f'{enum.__name__} has no {weights!r}; it has {found}') from None
        if weights is None:
            return timm.create_model(architecture, **kwargs)
        classes = len(weights.meta['categories'])
        if kwargs.get('num_classes', classes) != classes:
            raise ValueError(f'num_classes={kwargs["num_classes"]} does not fit {weights!r}, which has {classes}')
        return timm.create_model(weights.meta['timm_name'], pretrained=True, **kwargs)

    build.__name__ = build.__qualname__ = architecture
    build.__doc__ = f'{architecture} as timm makes it; further arguments are those of PreResNet.'
    build.__annotations__ = {'weights': enum | None, 'progress': bool, 'kwargs': Any, 'return': nn.Module}
    if getattr(BUILTIN_MODELS.get(architecture), '__module__', None) == __name__:
        del BUILTIN_MODELS[architecture]  # this package is imported again, as in a notebook
    register_model(architecture)(build)


for _name in ARCHITECTURES:
    _enum = _weights_enum(_name)
    globals()[_enum.__name__] = _enum
    setattr(torchvision.models, _enum.__name__, _enum)
    _register(_name, _enum)
