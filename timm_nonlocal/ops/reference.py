"""Eqs. (1) and (8) as they stand, from A and weights in any dtype: what the operator is compared with.

Shapes: B images, M positions, C channels, C' channels inside.
"""

from collections.abc import Sequence

from torch import Tensor

__all__ = ['original_block', 'proposed_stage']


def original_block(x: Tensor, a: Tensor, w_g: Tensor, w_z: Tensor) -> Tensor:
    """Z = X + A X Wᵀ with W = W_Z W_g, eq. (1).

    Args:
        x: (B, M, C).
        a: (B, M, M) or broadcastable to it.
        w_g, w_z: (C', C) and (C, C').

    Returns:
        (B, M, C).

    Example:
        >>> import torch
        >>> x, eye = torch.randn(2, 9, 4), torch.eye(4)
        >>> torch.equal(original_block(x, torch.eye(9), eye, eye), 2 * x)
        True
    """
    return x + a @ (x @ w_g.mT) @ w_z.mT


def proposed_stage(x: Tensor, a: Tensor, w_g: Sequence[Tensor], w_z: Sequence[Tensor]) -> list[Tensor]:
    """Z⁰ = X, Zⁿ⁺¹ = Zⁿ + (A Zⁿ - d Zⁿ) Wⁿᵀ, eq. (8) with eq. (14): d, the row sums of A, is 1 for normalised kernels.

    Args:
        x: (B, M, C).
        a: (B, M, M) or broadcastable to it.
        w_g, w_z: k of (C', C) and of (C, C').

    Returns:
        Z⁰, …, Zᵏ, (B, M, C) each.

    Example:
        >>> import torch
        >>> constant, a = torch.ones(1, 9, 4), torch.randn(1, 9, 9).softmax(-1)
        >>> z = proposed_stage(constant, a, [torch.randn(2, 4)], [torch.randn(4, 2)])
        >>> torch.allclose(z[1], constant, atol=1e-5)
        True
    """
    row_sums, z = a.sum(-1, keepdim=True), [x]
    for inner, outer in zip(w_g, w_z, strict=True):
        z.append(z[-1] + (a @ z[-1] - row_sums * z[-1]) @ inner.mT @ outer.mT)
    return z
