"""What the weights of a nonlocal block say: the eigenvalues of W̃ = (W + Wᵀ)/2 with W = W_Z W_g, eq. (7).

Pure functions of weights, computed in float64. For C' = C/2 and weights in general position W̃ has exactly C' positive
and C' negative eigenvalues, trained or not: W̃ = ½ U J Uᵀ with U = [W_Z, W_gᵀ] and J = [[0, I], [I, 0]], and Sylvester's
law gives it the inertia of J. What training changes is which of them are large, hence the counts among the top 32.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

TOP = 32  # the paper's figures show this many
_G_KEY = re.compile(r'(?:(?P<stage>.*)\.)?sub_blocks\.(?P<index>\d+)\.g\.weight')


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one block or sub-block.

    Attributes:
        stage: the state-dict prefix of the nonlocal part.
        kind: 'original' (each block has its own θ) or 'proposed'; controls without θ count as 'proposed'.
        index: the block's number in the stage.
        channels: C.
        inner_channels: C'.
        eigenvalues: all C of them, by magnitude, largest first.
        trace: tr W.
        norm: the Frobenius norm of W̃.
    """

    stage: str
    kind: str
    index: int
    channels: int
    inner_channels: int
    eigenvalues: tuple[float, ...]
    trace: float
    norm: float

    @property
    def top(self) -> tuple[float, ...]:
        """The `TOP` eigenvalues of greatest magnitude."""
        return self.eigenvalues[:TOP]

    @property
    def negative(self) -> int:
        """How many of the top ones are negative."""
        return sum(value < 0 for value in self.top)

    @property
    def positive(self) -> int:
        """How many of the top ones are positive."""
        return sum(value > 0 for value in self.top)

    def to_dict(self) -> dict[str, Any]:
        """The fields with the counts, the extremes and the top eigenvalues; everything JSON takes."""
        return {**asdict(self), 'eigenvalues': list(self.eigenvalues), 'top': len(self.top),
                'negative': self.negative, 'positive': self.positive,
                'min': min(self.eigenvalues), 'max': max(self.eigenvalues)}


def symmetric_eigenvalues(w_z: Tensor, w_g: Tensor) -> Tensor:
    """Eigenvalues of (W + Wᵀ)/2, W = W_Z W_g, by magnitude, largest first.

    Args:
        w_z: (C, C'), any floating dtype.
        w_g: (C', C).

    Returns:
        float64 (C,).
    """
    w = w_z.double() @ w_g.double()
    values = torch.linalg.eigvalsh((w + w.T) / 2)
    return values[values.abs().argsort(descending=True, stable=True)]


def spectra(state_dict: dict[str, Tensor]) -> list[Spectrum]:
    """The spectrum of every block of every nonlocal part in a state dict, in its order.

    Blocks are known by their keys, `<stage>.sub_blocks.<n>.g.weight` and `.z.weight`, of shapes (C', C) and (C, C').

    Raises:
        ValueError: a pair of weights that does not fit, or that is not finite.
    """
    records = []
    for key, w_g in state_dict.items():
        match = _G_KEY.fullmatch(key)
        block = key.removesuffix('g.weight')
        w_z = state_dict.get(block + 'z.weight')
        if not match or w_z is None:
            continue
        w_g, w_z = w_g.flatten(1), w_z.flatten(1)  # 1×1 convolutions count as matrices
        if w_z.shape != w_g.T.shape:
            raise ValueError(f'{block}: W_g is {tuple(w_g.shape)} and W_Z is {tuple(w_z.shape)}, not its transpose')
        if not (w_g.isfinite().all() and w_z.isfinite().all()):
            raise ValueError(f'{block}: the weights are not finite, so that they have no spectrum')
        values = symmetric_eigenvalues(w_z, w_g)
        records.append(Spectrum(
            stage=match['stage'] or '', kind='original' if block + 'theta.weight' in state_dict else 'proposed',
            index=int(match['index']), channels=w_z.shape[0], inner_channels=w_z.shape[1],
            eigenvalues=tuple(values.tolist()), trace=values.sum().item(), norm=values.norm().item()))
    return sorted(records, key=lambda record: (record.stage, record.index))
