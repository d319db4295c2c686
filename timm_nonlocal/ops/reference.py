"""Eqs. (1) and (8) as the paper has them, from A and the weights: what every other way to compute them must give.

Shapes: X (B, M, C), A (B, M, M) or broadcastable to it, W_g (C', C), W_Z (C, C').
"""

from collections.abc import Sequence

from torch import Tensor

__all__ = ['original_block', 'proposed_stage']


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
