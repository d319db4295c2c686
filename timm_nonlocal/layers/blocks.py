"""The original nonlocal block, eq. (1), and the nonlocal stage, eq. (8)-(9).

Tao, Sun, Du, Liu, "Nonlocal Neural Networks, Nonlocal Diffusion and Nonlocal Modeling", NeurIPS 2018. Neither has a
normalisation, an activation or a bias: both are linear in Z once the affinity is known, and what they learn is read
from the spectrum of W = W_Z W_g alone.

Shapes: X is (B, C, *grid) outside and (B, M, C) inside, with M positions; C' is `inner_dim`, C/2 by default.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.types import Device

from ..ops.stage import nonlocal_stage
from .affinity import BUILT_IN, affinity_class
from .maps import INITS, SubBlock, half, linear, positive
from .plain import global_hooks, hooked, is_plain, only_tensor_code, transforming
from .stable import made_together, make_stable

__all__ = ['INITS', 'KINDS', 'NonlocalBlock', 'NonlocalBlocks', 'NonlocalStage', 'SubBlock']


def _positions(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, C, *grid) -> (B, M, C)


def _grid(z: Tensor, like: Tensor) -> Tensor:
    return z.transpose(1, 2).reshape(like.shape)  # (B, M, C) -> (B, C, *grid)


def _attend(q: Tensor, k: Tensor, g: Tensor, scale: float, dim: int, inner: int) -> Tensor:
    """softmax(s Q Kᵀ) G for q and k (B, M, dim) and g (B, M, inner): (B, M, inner), for graphs without our operator."""
    if dim != inner:  # fused kernels take one width; zeros change nothing
        q, k = F.pad(q, (0, max(inner - dim, 0))), F.pad(k, (0, max(inner - dim, 0)))
        g = F.pad(g, (0, max(dim - inner, 0)))
    mixed = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), g.unsqueeze(1), scale=scale)
    return mixed.squeeze(1)[:, :, :inner]


class _Nonlocal(nn.Module):
    """What block and stage share: embeddings θ and φ (where the kernel has them) and the affinity A(X)."""

    __constants__ = ('literal',)  # as it is when TorchScript compiles the module
    __jit_unused_properties__ = ('literal',)

    def __init__(self, dim: int, inner_dim: Optional[int], *, affinity: str, symmetric: bool, scale: Optional[float],
                 normalize: Optional[str], init: str, merged: bool, dd: dict[str, Any]):
        super().__init__()
        inner_dim = half(dim) if inner_dim is None else positive('inner_dim', inner_dim)
        kernel = affinity_class(affinity)
        draw = 'xavier_normal' if init == 'zero' else init
        self.theta = linear(dim, inner_dim, draw, dd) if kernel.embedded else nn.Identity()
        self.phi = linear(dim, inner_dim, draw, dd) if kernel.embedded and not symmetric else None
        self.embed_dim = inner_dim if kernel.embedded else dim
        self.affinity = kernel(self.embed_dim, symmetric, scale=scale, normalize=normalize, **dd)
        self.inner_dim, self.merged = inner_dim, merged

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, (B, M, D) both, from X (B, M, C)."""
        q = self.theta(x)
        return q, q if self.phi is None else self.phi(x)

    def embedding_weights(self) -> list[Tensor]:
        """The weights (D, C) of θ and φ, as far as there are any. Only where not `literal`."""
        return [linear.weight for linear in (self.theta, self.phi) if isinstance(linear, nn.Linear)]

    @property
    def literal(self) -> bool:
        """Whether to follow the paper's equation and call every child: asked for, or one is more than its weight."""
        if not self.merged or global_hooks() or hooked(self.affinity) or type(self.affinity) not in BUILT_IN:
            return True
        theta, phi = self.theta, self.phi
        if type(theta) is nn.Identity:
            return hooked(theta) or phi is not None or not self._plain_maps()
        alike = is_plain(theta) and (phi is None or (is_plain(phi) and phi.out_features == theta.out_features))
        return not (alike and self._plain_maps())

    def _plain_maps(self) -> bool:
        """Whether W_g and W_Z are all that there is to their layers."""
        raise NotImplementedError

    def relate(self, x: Tensor) -> Tensor:
        """A(X), (B, M, M) or broadcastable to it, from X (B, M, C)."""
        q, k = self.embed(x)
        return self.affinity(q, k)


@register_notrace_module  # one node in timm's FX graphs, which thus round as the network does
class NonlocalBlock(_Nonlocal):
    """The original block, eq. (1): Z = X + A(X) X Wᵀ with W = W_Z W_g.

    Args:
        dim: C, the number of channels.
        inner_dim: C', the width of θ, φ and W_g; None takes C/2.
        affinity: one of `timm_nonlocal.layers.affinity.AFFINITIES`.
        symmetric: φ = θ, eq. (13).
        scale: factor on the kernel's inner product; None takes the kernel's default (1/√C' for the Gaussians).
        normalize: 'row_sum', 'positions' or None for the kernel's own.
        init: how θ, φ, W_g and W_Z are drawn, one of `INITS`; 'zero' zeroes W_Z, so that the block is the identity.
        merged: apply A without writing it out where the kernel allows it (exact), as long as every layer is a plain
            one (`literal`); False follows eq. (1) literally.

    Raises:
        ValueError: an odd dim without inner_dim, an unknown name, or a normaliser that the kernel does not have.

    Example:
        >>> x = torch.randn(2, 64, 8, 8)
        >>> NonlocalBlock(64, affinity='dot_product')(x).shape
        torch.Size([2, 64, 8, 8])
        >>> torch.equal(NonlocalBlock(64, init='zero')(x), x)
        True
    """

    def __init__(
            self,
            dim: int,
            inner_dim: Optional[int] = None,
            affinity: str = 'embedded_gaussian',
            symmetric: bool = False,
            scale: Optional[float] = None,
            normalize: Optional[str] = None,
            init: str = 'xavier_normal',
            merged: bool = True,
            device: Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(dim, inner_dim, affinity=affinity, symmetric=symmetric, scale=scale, normalize=normalize,
                         init=init, merged=merged, dd=dd)
        weight = SubBlock(dim, self.inner_dim, init, **dd)
        self.g, self.z = weight.g, weight.z

    def _plain_maps(self) -> bool:
        return is_plain(self.g) and is_plain(self.z)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *grid) to (B, C, *grid)."""
        tokens = _positions(x)
        if not torch.jit.is_scripting():
            if not self.literal and self.affinity.softmax and not only_tensor_code(x):
                return _grid(nonlocal_stage(tokens, self.embedding_weights(), [self.g.weight], [self.z.weight],
                                            scale=self.affinity.scale, formulation='original'), x)
        q, k = self.embed(tokens)
        g = self.g(tokens)  # (B, M, C')
        if self.literal:
            mixed = self.affinity.aggregate(self.affinity(q, k), g)
        elif self.affinity.softmax and not transforming():  # attention has no forward mode
            mixed = _attend(q, k, g, self.affinity.scale, self.embed_dim, self.g.out_features)
        else:
            a, right = self.affinity.operator(q, k)
            mixed = self.affinity.aggregate(a, g, right)
        return x + _grid(self.z(mixed), x)  # eq. (1)


class NonlocalBlocks(nn.Module):
    """k original blocks in a row, each with its own affinity of its own input: eq. (2) with eq. (3).

    Args:
        dim: C, the number of channels.
        k: the number of blocks, at least 1.
        kwargs: the arguments of `NonlocalBlock`.

    Raises:
        ValueError: as `NonlocalBlock`, or k < 1.

    Example:
        >>> NonlocalBlocks(64, k=2, inner_dim=16)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, dim: int, k: int = 1, **kwargs: Any):
        super().__init__()
        self.sub_blocks = nn.Sequential(*(NonlocalBlock(dim, **kwargs) for _ in range(positive('k', k))))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *grid) to (B, C, *grid)."""
        return self.sub_blocks(x)


@register_notrace_module  # one node in timm's FX graphs, which thus round as the network does
class NonlocalStage(_Nonlocal):
    """The proposed stage, eq. (8): Zⁿ⁺¹ = Zⁿ + (A(X) Zⁿ - Zⁿ) Wⁿᵀ for n < k, Z⁰ = X, with one affinity for all.

    Args:
        dim: C, the number of channels.
        k: the number of sub-blocks, at least 1.
        merged: compute with everything inside the stage C' wide and A not written out where the kernel allows it
            (exact), as long as every layer is a plain one (`literal`); False follows eq. (8) literally.
        recompute: keep only the stage's input for the backward pass, which then takes the time of a forward pass
            more (merged stages with a softmax affinity, which keep no M×M matrix in any case).
        stable: weights with which no sub-block can amplify ‖Z‖ in the norm that A is symmetric in, at no loss of
            generality (`layers.stable`); for kernels that are symmetric and positive semidefinite.
        inner_dim, affinity, symmetric, scale, normalize, init: as in `NonlocalBlock`.

    Raises:
        ValueError: as `NonlocalBlock`, k < 1, or stable=True with a kernel for which it guarantees nothing.

    Example:
        >>> stage = NonlocalStage(64, k=5)
        >>> stage(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
        >>> constant = torch.ones(2, 64, 8, 8)  # is a fixed point: nothing differs from its neighbours
        >>> torch.allclose(stage(constant), constant, atol=1e-4)
        True
    """

    if TYPE_CHECKING:  # TorchScript must not see it
        sub_blocks: Sequence[SubBlock]

    def __init__(
            self,
            dim: int,
            k: int = 1,
            inner_dim: Optional[int] = None,
            affinity: str = 'embedded_gaussian',
            symmetric: bool = False,
            scale: Optional[float] = None,
            normalize: Optional[str] = None,
            init: str = 'xavier_normal',
            merged: bool = True,
            recompute: bool = False,
            stable: bool = False,
            device: Device = None,
            dtype: Optional[torch.dtype] = None,
    ):
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(dim, inner_dim, affinity=affinity, symmetric=symmetric, scale=scale, normalize=normalize,
                         init=init, merged=merged, dd=dd)
        self.sub_blocks = nn.ModuleList(  # type: ignore[assignment]
            SubBlock(dim, self.inner_dim, init, **dd) for _ in range(positive('k', k)))
        self.recompute = recompute
        if stable:
            self._refuse_unstable(affinity, symmetric)
            for sub_block in self.sub_blocks:
                make_stable(sub_block.g, sub_block.z)

    def _refuse_unstable(self, affinity: str, symmetric: bool) -> None:
        if not self.affinity.semidefinite:
            raise ValueError(f'stable=True guarantees nothing for affinity={affinity!r}, whose kernel is not positive '
                             f"semidefinite and nonnegative: use 'embedded_gaussian', 'gaussian' or "
                             f"'positive_dot_product'")
        if self.affinity.embedded and not symmetric:
            raise ValueError('stable=True guarantees nothing for θ ≠ φ, where A need not be similar to a symmetric '
                             'matrix: use symmetric=True too')
        if self.affinity.scale < 0:
            raise ValueError(f'stable=True guarantees nothing for scale={self.affinity.scale}: use one of at least 0')

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *grid) to (B, C, *grid)."""
        tokens = _positions(x)
        if self.literal:
            return x + _grid(self._plain(self.relate(tokens), tokens), x)
        if not torch.jit.is_scripting():
            if self.affinity.softmax and not only_tensor_code(x):
                return _grid(self._fused(tokens), x)
        return x + _grid(self._merged(tokens), x)

    def _plain_maps(self) -> bool:
        widths = set()
        for block in self.sub_blocks:
            if type(block) is not SubBlock or hooked(block) or not is_plain(g := block.g) or not is_plain(block.z):
                return False
            widths.add(g.out_features)
        return len(widths) == 1  # structural pruning makes them differ

    def _plain(self, a: Tensor, x: Tensor) -> Tensor:
        """Zᵏ - X as the paper writes it. a (B, M, M), x (B, M, C)."""
        z = x
        for sub_block in self.sub_blocks:
            z = z + sub_block(self.affinity.difference(a, z))  # eq. (8)
        return z - x

    def _weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """W_gⁿ, k of (C', C), and W_Zⁿ, k of (C, C')."""
        if not torch.jit.is_scripting():
            made = made_together([(sub_block.g, sub_block.z) for sub_block in self.sub_blocks])
            if made is not None:
                return made
        w_g = [sub_block.g.weight for sub_block in self.sub_blocks]
        return w_g, [sub_block.z.weight for sub_block in self.sub_blocks]

    def _merged(self, x: Tensor) -> Tensor:
        """Zᵏ - X with A applied to C' channels: A acts on positions and W on channels, so the two commute.

        With Gᵐ = Zᵐ W_gᵐᵀ and Hⁿ = A Gⁿ - Gⁿ, eq. (8) reads Zⁿ⁺¹ = Zⁿ + Hⁿ W_Zⁿᵀ: no Zⁿ between X and Zᵏ is needed.
        """
        q, k = self.embed(x)
        a, right = self.affinity.operator(q, k)
        w_g, w_z = self._weights()
        wide, inner = F.linear(x, torch.cat(w_g)), w_g[0].shape[0]
        g = [wide.narrow(-1, m * inner, inner) for m in range(len(w_g))]  # X W_gᵐᵀ for all m, k of (B, M, C')
        h = []
        for n in range(len(g)):
            h.append(self.affinity.difference(a, g[n], right))
            for m in range(n + 1, len(g)):
                g[m] = g[m] + F.linear(h[n], w_g[m] @ w_z[n])  # (C', C')
        return F.linear(torch.cat(h, dim=-1), torch.cat(w_z, dim=1))  # Σ Hⁿ W_Zⁿᵀ, (B, M, C)

    def _fused(self, x: Tensor, backend: Optional[str] = None) -> Tensor:
        """Zᵏ as `_merged` has it, by one operator that keeps no A for the backward pass."""
        w_g, w_z = self._weights()
        return nonlocal_stage(x, self.embedding_weights(), w_g, w_z, scale=self.affinity.scale,
                              recompute=self.recompute, backend=backend)


KINDS = {'original': NonlocalBlocks, 'proposed': NonlocalStage}  # both take (dim, k, …)
