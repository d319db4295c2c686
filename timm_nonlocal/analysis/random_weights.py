"""What weights that learned nothing would show: the signs among the top eigenvalues of W̃ for Gaussian W_Z and W_g.

    python -c 'from timm_nonlocal.analysis.random_weights import write; write()'

draws the deviations of the usual shapes again and writes them to random_weights.json.
"""

import json
import math
from functools import lru_cache
from pathlib import Path

import torch

from ..files import write_text

__all__ = ['KEPT', 'USUAL', 'deviation', 'negative_of_random_weights', 'write']

KEPT = Path(__file__).with_name('random_weights.json')
DRAWS, DRAWS_KEPT = 500, 20_000
USUAL = [(64, 64, 32), (64, 32, 32), (128, 32, 32), (256, 32, 32), (512, 32, 32)]  # C' = C to C/16, the top 32


def negative_of_random_weights(channels: int, inner: int, top: int | None) -> tuple[float, float]:
    """Mean and standard deviation of the negative eigenvalues among the top ones, for Gaussian W_Z and W_g.

    -W is as likely as W, so the mean is half of what is counted. The deviation is that of draws from a fixed seed; it
    hardly depends on the size once there are many more eigenvalues than are counted, so large blocks are drawn smaller,
    with the same C'/C and at least twice as many non-zero eigenvalues as are counted.
    """
    nonzero = min(channels, 2 * inner)
    count = nonzero if top is None else min(top, nonzero)
    if count == nonzero == 2 * inner:
        return count / 2, 0.0  # all of them: inertia
    shrink = max(1.0, nonzero / (2 * count)) if count < nonzero else 1.0
    shape = math.ceil(channels / shrink), math.ceil(inner / shrink), count
    kept = _kept().get(','.join(map(str, shape)))
    return count / 2, deviation(*shape) if kept is None else kept


@lru_cache
def _kept() -> dict[str, float]:
    return json.loads(KEPT.read_text())['deviations'] if KEPT.is_file() else {}


@lru_cache
def deviation(channels: int, inner: int, count: int, draws: int = DRAWS) -> float:
    """The root mean square distance of the negative among the `count` largest from count/2, over random draws."""
    rank = min(channels, 2 * inner)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u = torch.randn(draws, rank, 2 * inner, dtype=torch.float64)  # [P, N]: ½(PPᵀ - NNᵀ) is distributed as W̃
        if rank < channels:  # the triangular factor of a Gaussian (C, 2C') matrix (Bartlett 1933)
            freedom = torch.arange(channels, channels - rank, -1, dtype=torch.float64)
            u = u.triu(1) + torch.distributions.Chi2(freedom).sample((draws,)).sqrt().diag_embed()
    signs = torch.ones(2 * inner, dtype=torch.float64)
    signs[inner:] = -1
    values = torch.linalg.eigvalsh((u * signs) @ u.mT)
    largest = values.abs().topk(count).indices
    return (values.gather(1, largest) < 0).sum(1).double().sub(count / 2).square().mean().sqrt().item()


def write() -> None:
    deviations = {','.join(map(str, shape)): round(deviation(*shape, DRAWS_KEPT), 3) for shape in USUAL}
    write_text(KEPT, json.dumps({'draws': DRAWS_KEPT, 'deviations': deviations}, indent=1) + '\n')
