"""Eqs. (1) and (8) as the paper has them, from A and the weights: what every other way to compute them must give.

Shapes: X (B, M, C), A (B, M, M) or broadcastable to it, W_g (C', C), W_Z (C, C').
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ['original_block', 'proposed_stage', 'written_out']


def original_block(x: Tensor, a: Tensor, w_g: Tensor, w_z: Tensor) -> Tensor:
    """Z = X + A X Wᵀ with W = W_Z W_g, eq. (1): (B, M, C), in the dtype that all arguments have."""
    return x + a @ (x @ w_g.T) @ w_z.T


def proposed_stage(x: Tensor, a: Tensor, w_g: Sequence[Tensor], w_z: Sequence[Tensor]) -> list[Tensor]:
    """Z⁰ = X, Z¹, …, Zᵏ of eq. (8) for k of W_g and of W_Z: k + 1 of (B, M, C), in the dtype that all arguments have.

    As in eq. (14), each position's own value counts as often as its row of A sums to: the rows need not sum to one.
    """
    z, row_sums = [x], a.sum(dim=-1, keepdim=True)
    for g, out in zip(w_g, w_z, strict=True):
        z.append(z[-1] + (a @ z[-1] - row_sums * z[-1]) @ g.T @ out.T)
    return z


def written_out(x: Tensor, w_in: Tensor, w_out: Tensor, inner: int, embeddings: int, scale: float,
                formulation: str) -> Tensor:
    """Zᵏ, (B, M, C), from what the operator takes, with A = softmax(s Q Kᵀ) written out: in x's dtype throughout."""
    w, w_z = w_in.to(x.dtype), w_out.to(x.dtype).split(inner, dim=1)
    dim = (len(w) - w_out.shape[1]) // embeddings if embeddings else 0
    *maps, w_g = w.split([dim] * embeddings + [w_out.shape[1]])
    q, k = (x @ maps[0].T, x @ maps[-1].T) if maps else (x, x)
    a = torch.softmax(scale * q @ k.mT, dim=2)
    if formulation == 'proposed':
        return proposed_stage(x, a, w_g.split(inner), w_z)[-1]
    z = x
    for g, out in zip(w_g.split(inner), w_z, strict=True):
        z = original_block(z, a, g, out)
    return z
