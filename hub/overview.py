"""README's picture: the spectra that training gives original blocks and proposed sub-blocks, beside those of chance."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from timm_nonlocal import paper
from timm_nonlocal.analysis.spectra import symmetric_eigenvalues

from . import drawing
from .results import Record, counted, median_records
from .spectra import kept

__all__ = ['SIZE', 'Expected', 'Spectra', 'chance', 'collect', 'digest']

SIZE = (64, 32)  # C and C' of the first stage, where these blocks are
RECIPES = 'paper', 'ft', 'short'  # the preferred one first
DEPTHS = {'original': (3, 2, 1), 'proposed': (5, 4, 6, 3, 2)}  # the preferred ones first; four take a lower rate
DRAWS = 500


class Spectra(NamedTuple):
    """A network's run and all eigenvalues of each of its blocks, in units of their root mean square, largest first."""

    record: Record
    recipe: str
    blocks: list[list[float]]


class Expected(NamedTuple):
    """Weights that learned nothing: the mean of each ordered eigenvalue, and between what 90 % of the draws lie."""

    mean: list[float]
    low: list[float]
    high: list[float]


def _scaled(values: torch.Tensor) -> torch.Tensor:
    """Eigenvalues (…, C), largest first, over their root mean square."""
    return values.sort(dim=-1, descending=True).values / values.square().mean(dim=-1, keepdim=True).sqrt()


def chance() -> Expected:
    """Of Gaussian W_Z (C, C') and W_g (C', C), from a fixed seed."""
    channels, inner = SIZE
    generator = torch.Generator().manual_seed(0)
    drawn = _scaled(torch.stack([
        symmetric_eigenvalues(torch.randn(channels, inner, generator=generator),
                              torch.randn(inner, channels, generator=generator)) for _ in range(DRAWS)]))
    low, high = drawn.quantile(torch.tensor([0.05, 0.95], dtype=drawn.dtype), dim=0)
    return Expected(drawn.mean(0).tolist(), low.tolist(), high.tolist())


def _found(kind: str, recipe: str, records: list[Record]) -> Spectra | None:
    """The preferred depth of a kind that a recipe gave, by its median run."""
    for k in DEPTHS[kind]:
        finished = counted(records, f'preresnet20_nl_{kind}_k{k}', paper.FIGURE_DATASET, recipe).finished
        for record in median_records(finished)[:1]:
            if kept(record):
                blocks = [_scaled(F.pad(values, (0, SIZE[0] - len(values)))).tolist() for values in (
                    torch.tensor(block['eigenvalues']) for block in record['spectra'][-1]['blocks'])]  # without zeros
                return Spectra(record, recipe, blocks)
    return None


def collect(records: list[Record]) -> list[Spectra]:
    """One network of each kind, of the recipe that gave both, else of the preferred one that gave any."""
    of_recipe = [{kind: found for kind in DEPTHS if (found := _found(kind, recipe, records))} for recipe in RECIPES]
    best_first = sorted(of_recipe, key=len, reverse=True)
    return [next(found[kind] for found in best_first if kind in found)
            for kind in DEPTHS if any(kind in found for found in of_recipe)]


def digest(spectra: list[Spectra]) -> str:
    """A name of what the picture shows."""
    return drawing.digest([each.blocks for each in spectra])
