"""Weights with which a nonlocal stage cannot amplify anything, however many sub-blocks it has.

Let K be positive semidefinite with nonnegative entries, such as a Gaussian kernel of one embedding (φ = θ, eq. (13)).
Then A = D⁻¹K is reversible with respect to π ∝ its row sums and has its eigenvalues in [0, 1]. In ‖Z‖²_π = Σᵢ πᵢ |Zᵢ|²
a sub-block multiplies the mode of A with eigenvalue 1 - μ by I - μW, and by convexity no mode grows for any μ in [0, 1]
if and only if ‖I - W‖₂ ≤ 1. All such W of rank C' or less are

    W = U (I - Q) Uᵀ,   U (C, C') with orthonormal columns,   ‖Q‖₂ ≤ 1,

so that W_g = Uᵀ and W_Z = U (I - Q); docs/stability.md has the proof. Both are made by torch's parametrisations: U by
Cayley's map of a skew-symmetric matrix, Q = I - T by a division where its norm is above 1, so that W = U T Uᵀ for any
small T and T = 0 is the identity, to which weight decay pulls. Cayley's map reaches every subspace, and the rotation
inside it is Q's to choose. (torch's Householder map does not survive weight decay, which its diagonal must not see.)

They are made in float64 and rounded once, which neither autocast nor a lower precision of products in float32 changes,
and of nothing that waits for a GPU, so that a training step with them can be captured in a CUDA graph.
"""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from .plain import transforming

__all__ = ['BASIS', 'contraction', 'made_together', 'make_stable', 'orthonormal', 'stable_weights']

BASIS = 'parametrizations.weight.0.basis'  # of W_g, in a state dict, where it is stable
SQUARINGS = 24


def contraction(s: Tensor) -> Tensor:
    """S / max(1, ‖S‖₂): every matrix of norm 1 or less, each from itself. s, finite, and the result (…, n, n)."""
    largest = s.detach().abs().amax((-2, -1), keepdim=True).clamp_min(1.0)
    s = s / largest  # its norm is finite, whatever S is
    norm = torch.linalg.matrix_norm(s, 2, keepdim=True) if transforming() else SpectralNorm.apply(s)
    return s / torch.maximum(norm, 1 / largest)


class SpectralNorm(torch.autograd.Function):
    """‖S‖₂, (…, 1, 1), from S (…, n, n), by squaring SᵀS again and again, which is a fixed number of products.

    What is left of it is the projector P onto the right singular vectors of the largest singular value, over their
    number: ‖S‖₂² = tr(P SᵀS), with the derivative 2 S P. Values nearer to the largest than 1 / 2^SQUARINGS of it count
    as the same. A derivative of the derivative is `torch.linalg.matrix_norm`'s.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor) -> Tensor:
        p = _over_trace(s.mT @ s)
        for _ in range(SQUARINGS // 3):
            p = p @ p
            p = p @ p
            p = _over_trace(p @ p)  # which is n⁻⁷ or more
        sp = s @ p
        norm = (sp * s).sum((-2, -1), keepdim=True).sqrt()
        ctx.save_for_backward(s, sp / norm.clamp_min(torch.finfo(s.dtype).tiny))
        return norm

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        s, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True
            slope, = torch.autograd.grad(torch.linalg.matrix_norm(s, 2).sum(), s, create_graph=True)
        return grads[0] * slope


def _over_trace(p: Tensor) -> Tensor:
    return p / p.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(torch.finfo(p.dtype).tiny)


def orthonormal(x: Tensor, basis: Tensor) -> Tensor:
    """Uᵀ (…, C', C) from any X of that shape: orthonormal rows, or columns where C' ≥ C. basis (…, n, n), n the larger.

    U = basis V with the first columns V of Cayley's map (I - S)⁻¹ (I + S) of the skew-symmetric S whose lower triangle
    is that of Xᵀ / 2, as `torch.nn.utils.parametrizations.orthogonal` has it.
    """
    tall = x if _is_tall(x) else x.mT
    n, k = tall.shape[-2:]
    lower = F.pad(tall.tril() / 2, (0, n - k))
    s, one = lower - lower.mT, torch.eye(n, device=x.device, dtype=x.dtype)
    v, _ = torch.linalg.solve_ex(one - s, (one + s)[..., :k])  # never singular; `solve` waits to see whether it is
    u = basis @ v
    return u if _is_tall(x) else u.mT


@torch.no_grad()
def make_stable(g: nn.Linear, z: nn.Linear) -> None:
    """Parametrises W_g, the weight (C', C) of g, and W_Z, the weight (C, C') of z, as above.

    U becomes the orthonormal factor of what g holds, and T is drawn with the spread of what z holds: zeros stay zeros.
    """
    spread, inner = _wide(z.weight).std(), z.in_features
    register_parametrization(g, 'weight', Cayley(g.weight))
    register_parametrization(z, 'weight', Damping(g))
    t = _maps(z).original
    t.copy_(torch.randn(inner, inner, device=t.device, dtype=spread.dtype) * spread)


def stable_weights(x: Tensor, basis: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """W_g, (…, C', C), and W_Z, (…, C, C'), in the dtype of X, from what a state dict holds; NaN where that has any.

    Args:
        x: (…, C', C), `….g.parametrizations.weight.original`.
        basis: (…, n, n) with n = max(C, C'), `….g.` and `BASIS`.
        t: (…, C', C'), `….z.parametrizations.weight.original`.
    """
    w_g = orthonormal(_wide(x), _wide(basis)).to(x.dtype)
    return w_g, _damped(_wide(w_g), _wide(t)).to(x.dtype)


def made_together(layers: list[tuple[nn.Linear, nn.Linear]]) -> Optional[tuple[list[Tensor], list[Tensor]]]:
    """The weights of all g and of all z, as each layer has its own, in one go; None where not all are `make_stable`'s.

    Args:
        layers: g and z of each sub-block, all of one shape.
    """
    held = []
    for g, z in layers:
        if not (is_parametrized(g, 'weight') and is_parametrized(z, 'weight')):
            return None
        of_g, of_z = _maps(g), _maps(z)
        if [*map(type, of_g), *map(type, of_z)] != [Cayley, Damping] or of_z[0].outside[0] is not g:
            return None
        held.append((of_g.original, of_g[0].basis, of_z.original))
    w_g, w_z = stable_weights(*(torch.stack(tensors) for tensors in zip(*held, strict=True)))
    return list(w_g), list(w_z)


class Cayley(nn.Module):
    """W_g from X by `orthonormal`, for a weight of the shape and dtype of the one given."""

    basis: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        n = max(weight.shape)
        self.register_buffer('basis', weight.new_empty(n, n))

    def forward(self, x: Tensor) -> Tensor:
        return orthonormal(_wide(x), _wide(self.basis)).to(x.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """X = 0, and the basis for which its U is the orthonormal factor of a weight (C', C)."""
        tall = _wide(weight if _is_tall(weight) else weight.mT)
        n, k = tall.shape
        q, r = torch.linalg.qr(torch.cat([tall, torch.randn(n, n - k, device=tall.device, dtype=tall.dtype)], dim=1))
        self.basis.copy_(q * torch.where(r.diagonal() < 0, -1, 1))  # the factor of an orthonormal weight is itself
        return torch.zeros_like(weight)


class Damping(nn.Module):
    """W_Z = U (I - Q) from T, with Q = `contraction(I - T)` and Uᵀ the weight of another layer, which stays its own."""

    def __init__(self, g: nn.Linear):
        super().__init__()
        self.outside = (g,)  # in a tuple it is no child, and its parameters are not listed twice

    def forward(self, t: Tensor) -> Tensor:
        return _damped(_wide(self.outside[0].weight), _wide(t)).to(t.dtype)

    def right_inverse(self, z: Tensor) -> Tensor:
        """T of W_Z, (C, C'), as far as that lies in the range of U."""
        return (_wide(self.outside[0].weight) @ _wide(z)).to(z.dtype)


def _damped(w_g: Tensor, t: Tensor) -> Tensor:
    one = torch.eye(t.shape[-1], device=t.device, dtype=t.dtype)
    return w_g.mT @ (one - contraction(one - t))


def _is_tall(weight: Tensor) -> bool:
    return weight.shape[-2] >= weight.shape[-1]


def _wide(tensor: Tensor) -> Tensor:
    """In float64, or in float32 on accelerators that may have no more, such as Apple's."""
    return tensor.to(torch.float64 if tensor.device.type in ('cpu', 'cuda', 'meta') else torch.float32)


def _maps(layer: nn.Linear) -> Any:
    """The list of a weight's parametrisations, with `original`, what they begin with."""
    return layer.get_submodule('parametrizations.weight')
