"""Draws docs/stability.svg, the energy of the features through 64 sub-blocks: python -m benchmarks.stability

Fresh weights (Xavier), features and A from standard normal numbers on a 12×12 grid of 64 channels, in float64.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from timm_nonlocal import NonlocalStage
from timm_nonlocal.analysis.dynamics import stationary
from timm_nonlocal.analysis.recorder import trajectory
from timm_nonlocal.files import write
from train.records.runs import ROOT

PICTURE = ROOT / 'docs' / 'stability.svg'
SEEDS, DEPTH, CHANNELS, POSITIONS = 5, 64, 64, 144


def energies(seed: int, stable: bool) -> Tensor:
    """‖Zⁿ‖²_π / ‖X‖²_π for n = 0, …, `DEPTH`: float64 (DEPTH + 1,)."""
    torch.manual_seed(seed)
    stage = NonlocalStage(CHANNELS, DEPTH, symmetric=True, stable=stable).double()
    a, z = trajectory(stage, torch.randn(1, POSITIONS, CHANNELS, dtype=torch.float64))
    energy = torch.stack([stationary(a[0]) @ step[0].square().sum(1) for step in z])
    return energy / energy[0]


@torch.no_grad()
def draw(path: Path = PICTURE) -> None:
    """Writes the picture; the same bytes with the same matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(6, 3.6), layout='constrained')
    axes = sheet.subplots()
    for stable, colour, label in ((False, '#b2182b', 'unconstrained'), (True, '#2166ac', 'stable=True')):
        for seed in range(SEEDS):
            axes.plot(energies(seed, stable), color=colour, linewidth=1, label=label if seed == 0 else None)
    axes.axhline(1, color='black', linewidth=0.5)
    axes.set(xlabel='sub-blocks', ylabel='‖Zⁿ‖² / ‖X‖², weighted by π', yscale='log')
    axes.legend()
    with matplotlib.rc_context({'svg.hashsalt': 'timm_nonlocal'}):
        write(path, lambda beside: sheet.savefig(beside, metadata={'Date': None}))


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__.split('\n\n')[0]).parse_args()
    sys.exit(draw())
