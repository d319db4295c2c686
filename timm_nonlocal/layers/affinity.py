"""How strongly positions relate: kernels K, normalisers C and affinities A = C⁻¹K.

The four pairwise functions of Wang, Girshick, Gupta, He, "Non-local Neural Networks" (CVPR 2018), section 3.2, a
positive one whose cost is linear in the number of positions, and two controls without which no gain can be called
nonlocal. An affinity is a module: `forward(q, k)` gives A from the embedded features of the queries and the keys,
`aggregate(a, z)` the sum Σⱼ Aᵢⱼ Zⱼ, and `difference(a, z)` the nonlocal operator of eq. (14) in Tao, Sun, Du, Liu
(NeurIPS 2018), Σⱼ Aᵢⱼ (Zⱼ - Zᵢ). `operator(q, k)` gives what the two need where that is less than A.

Shapes: B images, M positions, D embedding channels, C channels of whatever A is applied to.
"""

from typing import Final, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.types import Device

from .memory import check_memory

__all__ = ['AFFINITIES', 'Affinity', 'affinity_class']

torch.fx.wrap('check_memory')  # symbolic tracing records the call: the sizes are known when it runs


class Affinity(nn.Module):
    """What every affinity shares. Rows are positions, and rows of A sum to one unless a class says otherwise.

    Args:
        dim: D, the width of the embedded features.
        symmetric: the keys are the queries (eq. (13)), so that K is a symmetric matrix.
        scale: factor on the inner product of two features; None takes the kernel's own default.
        normalize: 'row_sum' (Cᵢ = Σⱼ Kᵢⱼ, eq. (4) and (9)) or 'positions' (Cᵢ = M); None takes the kernel's own.

    Raises:
        ValueError: the kernel cannot be normalised or scaled as asked.
    """

    embedded = True  # learns θ (and φ) in front of the kernel
    softmax: Final[bool] = False  # A = softmax(s Q Kᵀ), which `ops` and attention kernels apply unwritten
    semidefinite = False  # K is positive semidefinite and nonnegative where the keys are the queries
    signed_scale = True  # False where a negative scale would make K negative
    normalize = 'row_sum'
    reason = ''  # why the other normaliser is refused

    def __init__(
            self,
            dim: int,
            symmetric: bool = False,
            scale: Optional[float] = None,
            normalize: Optional[str] = None,
            device: Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__()
        if normalize not in (None, self.normalize):
            why = self.reason or "it is one of 'row_sum' and 'positions'"
            raise ValueError(f"normalize={normalize!r} does not fit {type(self).__name__}: {why}; "
                             f"use normalize={self.normalize!r}")
        self.scale = self.default_scale(dim) if scale is None else float(scale)
        if self.scale < 0 and not self.signed_scale:
            raise ValueError(f'scale={scale} makes the kernel negative: use a scale of at least 0')

    @staticmethod
    def default_scale(dim: int) -> float:
        return 1.0

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """A, (B, M, M) or broadcastable to it, from queries and keys, both (B, M, D)."""
        raise NotImplementedError

    def operator(self, q: Tensor, k: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        """A for `aggregate` and `difference`: (A, None), or L and R of A = L Rᵀ, (B, M, r) both, where r is small."""
        return self.forward(q, k), None

    def aggregate(self, a: Tensor, z: Tensor, right: Optional[Tensor] = None) -> Tensor:
        """Σⱼ Aᵢⱼ Zⱼ, the sum in eq. (1), for A from `forward`, or L and R from `operator`; z (B, M, C): (B, M, C)."""
        return (a @ (z if right is None else right.transpose(1, 2) @ z)).expand_as(z)

    def difference(self, a: Tensor, z: Tensor, right: Optional[Tensor] = None) -> Tensor:
        """Σⱼ Aᵢⱼ (Zⱼ - Zᵢ), eq. (14), for A from `forward`, or L and R from `operator`; z (B, M, C): (B, M, C)."""
        return self.aggregate(a, z, right) - z  # rows of A sum to one

    def extra_repr(self) -> str:
        return f'scale={self.scale:.4g}, normalize={self.normalize}'


class Gaussian(Affinity):
    """ω(xᵢ, xⱼ) = exp(s xᵢ·xⱼ) over its row sum: a softmax over the keys. s defaults to 1/√D."""

    embedded = False
    softmax: Final[bool] = True  # type: ignore[misc]  # Final tells TorchScript that it is a constant
    semidefinite = True
    reason = 'exp grows without bound, and only its row sum keeps it finite'

    @staticmethod
    def default_scale(dim: int) -> float:
        return dim ** -0.5

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax((check_memory(q) * self.scale) @ k.transpose(1, 2), dim=-1)  # (B, M, M)


class EmbeddedGaussian(Gaussian):
    """The Gaussian of embedded features, ω = exp(s θ(xᵢ)·φ(xⱼ)) over its row sum."""

    embedded = True


class Uniform(Affinity):
    """Control: every position relates equally to every other, A = 1/M. The stage is then a centred 1×1 convolution."""

    embedded = False
    semidefinite = True

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return q.new_ones(1, 1, q.shape[1]) / q.shape[1]  # one row stands for all


class Identity(Affinity):
    """Control: every position relates to itself alone, A = I (the Dirac case of the paper's section 2.2)."""

    embedded = False
    semidefinite = True

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.eye(q.shape[1], device=q.device, dtype=q.dtype).unsqueeze(0)  # (1, M, M)

    def operator(self, q: Tensor, k: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        return q, None  # nothing is needed

    def aggregate(self, a: Tensor, z: Tensor, right: Optional[Tensor] = None) -> Tensor:
        return z


class PerPosition(Affinity):
    """Kernels normalised by M, as Wang et al. do. Their rows need not sum to one, so eq. (14) takes off the row sum."""

    normalize = 'positions'

    def difference(self, a: Tensor, z: Tensor, right: Optional[Tensor] = None) -> Tensor:
        row_sum = self.aggregate(a, torch.ones_like(z[:, :, :1]), right)
        return self.aggregate(a, z, right) - row_sum * z  # (KZ)ᵢ/Cᵢ - (dᵢ/Cᵢ) Zᵢ


class ProductOfFeatures(Affinity):
    """A = L Rᵀ for two features of every position, (B, M, r) both: it need not be written out."""

    def factors(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """L and R."""
        raise NotImplementedError

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        left, right = self.factors(check_memory(q), k)
        return left @ right.transpose(1, 2)  # (B, M, M)

    def operator(self, q: Tensor, k: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        left, right = self.factors(q, k)
        return left, right


class DotProduct(ProductOfFeatures, PerPosition):
    """ω(xᵢ, xⱼ) = s θ(xᵢ)·φ(xⱼ) over M. s defaults to 1."""

    reason = 'a dot product takes both signs, so its row sums come near zero or below it; positive_dot_product has one'

    def factors(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q * self.scale, k / q.shape[1]


class PositiveDotProduct(ProductOfFeatures):
    """ω(xᵢ, xⱼ) = 1 + s ReLU(θ(xᵢ))·ReLU(φ(xⱼ)) over its row sum. s defaults to 1/√D.

    A product of the non-negative features [1, √s ReLU(·)]. Its row sums are never below M, so that no input brings
    them near zero; without the 1, a row whose features are all negative would have none.
    """

    semidefinite = True
    signed_scale = False
    reason = 'its row sum is what makes the rows of A sum to one'

    @staticmethod
    def default_scale(dim: int) -> float:
        return dim ** -0.5

    def factors(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        left, right = F.pad(F.relu(q) * self.scale, (0, 1), value=1.0), F.pad(F.relu(k), (0, 1), value=1.0)
        wide = torch.promote_types(left.dtype, torch.float32)
        mean = (left * right.mean(dim=1, keepdim=True, dtype=wide)).sum(dim=2, keepdim=True)  # Cᵢ / M, at least 1
        return left / mean.to(left.dtype), right / q.shape[1]


class Concatenation(PerPosition):
    """ω(xᵢ, xⱼ) = ReLU(s w·[θ(xᵢ), φ(xⱼ)]) over M. Symmetric: both halves of w are the same. s defaults to 1."""

    reason = 'ReLU can set a whole row to zero'

    def __init__(
            self,
            dim: int,
            symmetric: bool = False,
            scale: Optional[float] = None,
            normalize: Optional[str] = None,
            device: Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        super().__init__(dim, symmetric, scale=scale, normalize=normalize)
        self.weight = nn.Parameter(torch.empty(1 if symmetric else 2, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        w = self.weight * self.scale
        rows = check_memory(q) @ w[0] / q.shape[1]  # (B, M), as are the columns: w·[θ, φ] splits into a sum
        columns = k @ w[-1] / q.shape[1]
        return F.relu(rows.unsqueeze(2) + columns.unsqueeze(1))  # (B, M, M)


AFFINITIES = {
    'embedded_gaussian': EmbeddedGaussian,
    'gaussian': Gaussian,
    'dot_product': DotProduct,
    'positive_dot_product': PositiveDotProduct,
    'concatenation': Concatenation,
    'uniform': Uniform,
    'identity': Identity,
}
BUILT_IN = tuple(AFFINITIES.values())  # any other class, a subclass too, is asked for its A


def affinity_class(name: str) -> type[Affinity]:
    """The class of an affinity by its name.

    Raises:
        ValueError: an unknown name; the message has the known ones.

    Example:
        >>> affinity_class('positive_dot_product')
        <class 'timm_nonlocal.layers.affinity.PositiveDotProduct'>
        >>> q = torch.randn(1, 5, 8)
        >>> a = affinity_class('gaussian')(dim=8)(q, q)  # (B, M, M)
        >>> torch.allclose(a.sum(dim=2), torch.ones(1, 5))
        True
    """
    if name not in AFFINITIES:
        raise ValueError(f'affinity={name!r} is unknown: use one of {", ".join(AFFINITIES)}')
    return AFFINITIES[name]
