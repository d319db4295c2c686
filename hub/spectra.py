"""The spectra that cards and figures show: of weights, and of the epochs that a run kept on the way."""

from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file

from timm_nonlocal import spectrum
from timm_nonlocal.analysis.spectra import TOP, Spectrum
from timm_nonlocal.recipes import Recipe

from .results import Record

__all__ = ['Kept', 'kept', 'of_weights']

NEAR = 0.02  # of a run: how far a kept epoch may be from the one that is asked for


class Kept(NamedTuple):
    """The top eigenvalues of every block after an epoch."""

    epoch: int
    epochs: int  # of the run
    tops: list[tuple[float, ...]]


def of_weights(path: Path) -> list[Spectrum]:
    """The spectrum of every block of a weight file."""
    return spectrum(load_file(path))


def kept(record: Record, epoch: int | None = None) -> Kept | None:
    """What a run kept after an epoch, its last unless one is asked for, or after the nearest within `NEAR`, the earlier
    of two; None where it kept nothing there."""
    epochs = Recipe.from_dict(record['recipe']).epochs
    wanted = epochs if epoch is None else epoch
    near = [entry for entry in record.get('spectra') or [] if abs(entry['epoch'] - wanted) <= NEAR * epochs]
    if not near:
        return None
    found = min(near, key=lambda entry: (abs(entry['epoch'] - wanted), entry['epoch']))
    return Kept(found['epoch'], epochs, [tuple(block['eigenvalues'][:TOP]) for block in found['blocks']])
