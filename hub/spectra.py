"""The spectra that cards and figures show: of weights, and of the epochs that a run kept on the way."""

from pathlib import Path

from safetensors.torch import load_file

from timm_nonlocal import spectrum
from timm_nonlocal.analysis.spectra import TOP, Spectrum

from .results import Run


def of_weights(path: Path) -> list[Spectrum]:
    """The spectrum of every block of a weight file."""
    return spectrum(load_file(path))


def kept(run: Run, epoch: int) -> list[tuple[float, ...]]:
    """The top eigenvalues of every block after an epoch, where the run kept them; else none."""
    for entry in run.get('spectra') or []:
        if entry['epoch'] == epoch:
            return [tuple(block['eigenvalues'][:TOP]) for block in entry['blocks']]
    return []
