"""The spectra that cards and figures show: of weights, of the epochs kept on the way, and what chance would give."""

from functools import cache
from pathlib import Path
from statistics import mean, stdev

import torch

from timm_nonlocal.checkpoint import read_file
from timm_nonlocal.spectrum import TOP, Spectrum, spectra, symmetric_eigenvalues

from .results import Run

DRAWS = 200


def of_weights(path: Path) -> list[Spectrum]:
    """The spectrum of every block of a weight file."""
    return spectra(read_file(path))


def kept(run: Run, epoch: int) -> list[tuple[float, ...]]:
    """The top eigenvalues of every block after an epoch, where the run kept them; else none."""
    for entry in run.get('spectra') or []:
        if entry['epoch'] == epoch:
            return [tuple(block['eigenvalues'][:TOP]) for block in entry['blocks']]
    return []


@cache
def chance(channels: int, inner_channels: int) -> tuple[float, float]:
    """Mean and standard deviation of the negative ones among the top 32 for random Gaussian weights, by `DRAWS` draws.

    Without them a count misleads: half of all eigenvalues are negative whatever the training did.
    """
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(DRAWS):
        w_z, w_g = torch.randn(2, channels, inner_channels, generator=generator, dtype=torch.float64)
        counts.append((symmetric_eigenvalues(w_z, w_g.T)[:TOP] < 0).sum().item())
    return mean(counts), stdev(counts)
