"""What the tags stand for: the data set and the recipe that a network was trained with, and where its weights are.

Weights are looked for in the package, `weights/<architecture>.<tag>.safetensors`, then on the Hub, under the id that
`weights/index.json` gives. A tag with neither promises nothing: `timm.list_pretrained` does not list it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import generate_default_cfgs, resolve_pretrained_cfg

from ..datasets import DATASETS
from ..paper import ARXIV, TITLE
from ..recipes import RECIPES

__all__ = ['INDEX', 'TAGS', 'WEIGHTS', 'Tag', 'default_cfgs', 'mean_by_tag', 'require_weights']

WEIGHTS = Path(__file__).resolve().parents[1] / 'weights'


@dataclass(frozen=True)
class Tag:
    dataset: str  # a key of DATASETS
    recipe: str  # a key of timm_nonlocal.recipes.RECIPES


TAGS = {**{dataset: Tag(dataset, 'paper') for dataset in DATASETS},
        **{f'ft_{dataset}': Tag(dataset, 'ft') for dataset in DATASETS}}  # in the order of preference


def mean_by_tag(tag: str | None) -> str:
    """What networks with a tag are trained without, 'image' or 'colour', see `Recipe.mean`; other tags say nothing."""
    return RECIPES[TAGS[tag].recipe if tag in TAGS else 'paper'].mean


def _index() -> dict[str, dict[str, Any]]:
    """What is known of each weight file by its name, `<architecture>.<tag>`; see `python -m hub.index`."""
    path = WEIGHTS / 'index.json'
    return json.loads(path.read_text()) if path.is_file() else {}


INDEX = _index()


def _cfg(architecture: str, tag: str) -> dict[str, Any]:
    data, file = DATASETS[TAGS[tag].dataset], WEIGHTS / f'{architecture}.{tag}.safetensors'
    return dict(
        file=str(file) if file.is_file() else None,
        hf_hub_id=INDEX.get(f'{architecture}.{tag}', {}).get('hf_hub_id'),
        num_classes=data.num_classes, label_names=data.labels, mean=data.mean, std=(1.0, 1.0, 1.0),
        input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, interpolation='bicubic',
        first_conv='conv1', classifier='fc', license='apache-2.0', paper_ids=f'arXiv:{ARXIV}', paper_name=TITLE,
    )


def default_cfgs(architectures: dict[str, str]) -> dict[str, Any]:
    """timm's cfgs for every architecture and tag; architectures maps each name to the data set that it has unasked.

    The default is that data set's first tag with weights, and the first of all where none has any.
    """
    cfgs: dict[str, Any] = {}
    for name, dataset in architectures.items():
        own = {tag: _cfg(name, tag) for tag in TAGS}
        wanted = [tag for tag in TAGS if TAGS[tag].dataset == dataset]
        default = next((tag for tag in wanted if own[tag]['file'] or own[tag]['hf_hub_id']), wanted[0])
        # '*' marks the default, which keeps its place only if it comes after a tag that has weights
        for tag in sorted(TAGS, key=default.__eq__):
            cfgs[f'{name}.{tag}{"*" if tag == default else ""}'] = own[tag]
    return generate_default_cfgs(cfgs)


def require_weights(architecture: str, pretrained_cfg: Any = None, pretrained_cfg_overlay: Any = None) -> None:
    """Raises RuntimeError, naming the tags that have weights, if timm would find none for this cfg."""
    cfg = resolve_pretrained_cfg(
        architecture, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay)
    if not cfg.has_weights and not cfg.state_dict:
        name = f'{architecture}.{cfg.tag}' if cfg.tag else architecture
        found = ', '.join(name for name in timm.list_pretrained('preresnet*') if '.' in name)
        raise RuntimeError(f'{name} has no pretrained weights; tags that have some: {found or "none so far"}')
