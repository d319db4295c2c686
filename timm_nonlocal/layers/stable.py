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
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import register_parametrization

__all__ = ['BASE', 'contraction', 'make_stable', 'stable_weights']

BASE = 'parametrizations.weight.0.0.base'  # of W_g, in a state dict, where it is stable


def contraction(s: Tensor) -> Tensor:
    """S / max(1, ‖S‖₂): every matrix of norm 1 or less, each from itself. s, finite, and the result (n, n)."""
    largest = s.detach().abs().amax().clamp_min(1.0)
    s = s / largest  # its norm is finite, whatever S is
    return s / torch.maximum(torch.linalg.matrix_norm(s, 2), 1 / largest)


def _exactly(device: torch.device) -> AbstractContextManager:
    """Without autocast: rounded to eight bits U would not be orthonormal. The meta device has none."""
    return nullcontext() if device.type == 'meta' else torch.autocast(device.type, enabled=False)


class Damping(nn.Module):
    """W_Z = U (I - Q) from T, with Q = `contraction(I - T)` and Uᵀ the weight of another layer, which stays its own."""

    def __init__(self, g: nn.Linear):
        super().__init__()
        self.outside = (g,)  # in a tuple it is no child, and its parameters are not listed twice

    def forward(self, t: Tensor) -> Tensor:
        with _exactly(t.device):
            wide = torch.promote_types(t.dtype, torch.float32)
            u, one = self.outside[0].weight.mT.to(wide), torch.eye(len(t), device=t.device, dtype=wide)
            return (u @ (one - contraction(one - t))).to(t.dtype)

    def right_inverse(self, z: Tensor) -> Tensor:
        """T of W_Z, (C, C'), as far as that lies in the range of U."""
        return self.outside[0].weight @ z


class WithoutAutocast(nn.Sequential):
    """Another parametrisation, in float32 or more."""

    def forward(self, x: Tensor) -> Tensor:
        with _exactly(x.device):
            if (wide := torch.promote_types(x.dtype, torch.float32)) == x.dtype:
                return self[0](x)
            base = self.get_buffer('0.base').to(wide)
            return torch.func.functional_call(self[0], {'base': base}, x.to(wide)).to(x.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self.get_submodule('0').right_inverse(weight)  # type: ignore[operator]


@torch.no_grad()
def make_stable(g: nn.Linear, z: nn.Linear) -> None:
    """Parametrises W_g, the weight (C', C) of g, and W_Z, the weight (C, C') of z, as above.

    U becomes the orthonormal factor of what g holds, and T is drawn with the spread of what z holds: zeros stay zeros.
    """
    weight, dtype = z.weight, z.weight.dtype
    if (wide := torch.promote_types(dtype, torch.float32)) != dtype:  # torch has no linear algebra of 16 bits
        make_stable(g.to(wide), z.to(wide))
        g.to(dtype)
        z.to(dtype)
        return
    with _exactly(weight.device):
        t = torch.randn(z.in_features, z.in_features, device=weight.device, dtype=wide) * weight.std()
        orthogonal(g, 'weight', orthogonal_map='cayley')
        _maps(g)[0] = WithoutAutocast(inner := _maps(g)[0])
        base = weight.new_empty(len(weight), len(weight)) if weight.is_meta else inner.get_buffer('base')
        inner.register_buffer('base', base.contiguous())  # safetensors saves no other
        register_parametrization(z, 'weight', Damping(g))
        _maps(z).get_parameter('original').copy_(t)


def stable_weights(x: Tensor, base: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """W_g, (C', C), and W_Z, (C, C'), from what a state dict holds, in its dtype; NaN where that is not finite.

    Args:
        x: (C', C), `….g.parametrizations.weight.original`.
        base: (C, C), `….g.` and `BASE`.
        t: (C', C'), `….z.parametrizations.weight.original`.
    """
    inner, channels = x.shape
    if not all(tensor.isfinite().all() for tensor in (x, base, t)):
        return torch.full_like(x, torch.nan), torch.full_like(x, torch.nan).mT
    with torch.random.fork_rng(devices=[]):
        g, z = (nn.Linear(*shape, bias=False, dtype=x.dtype) for shape in ((channels, inner), (inner, channels)))
        make_stable(g, z)
    g.load_state_dict({'parametrizations.weight.original': x, BASE: base})
    z.load_state_dict({'parametrizations.weight.original': t})
    return g.weight.detach(), z.weight.detach()


def _maps(layer: nn.Linear) -> nn.ModuleList:
    """The parametrisations of a layer's weight."""
    maps = layer.get_submodule('parametrizations.weight')
    assert isinstance(maps, nn.ModuleList)
    return maps
