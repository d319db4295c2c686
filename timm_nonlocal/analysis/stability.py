"""The CFL number of section 4.4 for the blocks of one stage, from their weights: how far a frozen A could amplify."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dynamics
from .spectra import restricted

__all__ = ['stability']

LARGEST = 345.0  # log of the largest κ: its square is below 1e300


def stability(weights: Sequence[tuple[Tensor, Tensor]], formulation: str, symmetric: bool | None = None,
              mu_max: float | None = None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """κ of every block of a stage and of the whole stage (`timm_nonlocal.analysis.dynamics` has the mathematics).

    Args:
        weights: W_Z (C, C') and W_g (C', C) of every block in order, finite.
        formulation: 'proposed' or 'original'.
        symmetric: φ = θ.
        mu_max: the largest eigenvalue of I - A; None takes 1, which no positive definite kernel exceeds.

    Returns:
        a dict a block: `kappa`; `constant_gain`, ‖I + W‖₂ of the original block, by which any A with unit row sums can
        amplify the constants (None for the proposed, which leaves them); `radius`, the asymptotic growth a step, and
        `outside`, how many `eigenvalues` of W, [real, imaginary], break the CFL condition;
        and one of the stage: `mu_max`; `mu_basis`, 'given', 'bound' (φ = θ: μ ≤ 1 for the Gaussian kernels) or
        'assumed' (θ ≠ φ or unknown: the number is exact only for an A that is measured); `kappa` of all blocks in a
        row, `at_mu`, the μ where it is reached.

    Raises:
        OverflowError: κ² might exceed what float64 holds.

    Example:
        >>> eye = torch.eye(4)
        >>> (diffuses, amplifies), stage = stability([(eye, eye / 2), (eye, -eye / 2)], 'proposed')
        >>> [round(number, 3) for number in (diffuses['kappa'], amplifies['kappa'], stage['kappa'])]
        [1.0, 1.5, 1.0]
        >>> amplifies['outside']  # all eigenvalues of -I/2
        4
    """
    basis = 'given' if mu_max is not None else 'bound' if symmetric else 'assumed'
    mu_max = 1.0 if mu_max is None else mu_max
    if sum(math.log1p(2 * (w_z.double().norm() * w_g.double().norm()).item()) for w_z, w_g in weights) > LARGEST:
        raise OverflowError('the weights are so large that kappa does not fit into float64')
    blocks, whole = [], []
    for w_z, w_g in weights:
        left, right = restricted(w_z.double(), w_g.double())
        values = torch.linalg.eigvals(right @ left)  # those of W, without C - C' zeros
        outside, radius = dynamics.cfl(values, mu_max, formulation)
        gain = None
        if formulation == 'original':
            gain = dynamics.gains([left @ right], torch.zeros(1, dtype=torch.float64), formulation).item()
            gain = gain if len(left) == len(w_z) else max(1.0, gain)  # outside the range of W it is 1
        order = values.abs().argsort(descending=True, stable=True)
        blocks.append({
            'kappa': dynamics.kappa([left @ right], mu_max, formulation)[0], 'constant_gain': gain, 'radius': radius,
            'outside': outside, 'eigenvalues': [[value.real, value.imag] for value in values[order].tolist()],
        })
        whole.append(left @ right if len(weights) == 1 else w_z.double() @ w_g.double())
    kappa, at_mu = dynamics.kappa(whole, mu_max, formulation)
    return blocks, {'mu_max': mu_max, 'mu_basis': basis, 'kappa': kappa, 'at_mu': at_mu}
