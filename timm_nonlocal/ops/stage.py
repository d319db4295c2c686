"""The nonlocal stage with a softmax affinity, eq. (8), and the block of eq. (1), as one differentiable operator.

Zᵏ = X + Σₙ Hⁿ W_Zⁿᵀ, where the Hⁿ, C' wide, come from a backend (`products`, `triton_backend`). No M×M matrix is kept
for the backward pass: it makes A again, and closes with one pass for Q and K whatever k is, since
dA = [dH¹…dHᵏ][G¹…Gᵏ]ᵀ.

Shapes: B images, M positions, C channels, D embedding channels, k sub-blocks of C' channels each.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS, CustomOpDef
from torch.autograd import forward_ad
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .products import ProductBackend
from .reference import written_out

if TYPE_CHECKING:
    from .triton_backend import TritonBackend

__all__ = ['can_run', 'nonlocal_stage', 'transforming']

RECOMPUTE_BYTES = 48 << 20  # what a chunk of images may take where nothing but x is kept
BACKENDS = 'triton', 'products'  # the fastest first
FORMULATIONS = 'proposed', 'original'
OPTIONS = 'inner', 'embeddings', 'scale', 'formulation', 'backend', 'recompute'  # of both operators


def can_run(backend: str, device: torch.device, dtype: torch.dtype, dim: int, inner: int) -> bool:
    """Whether a backend takes a device, a dtype, D and C': 'products' takes all."""
    return backend == 'products' or (backend == 'triton' and max(dim, inner) <= _triton_width(device, dtype))


@torch.compiler.assume_constant_result  # what it asks cannot be traced
def _triton_width(device: torch.device, dtype: torch.dtype) -> int:
    """The largest D and C' that the Triton kernels take, 0 where they do not run."""
    if device.type != 'cuda':
        return 0
    try:
        from .triton_backend import TritonBackend
    except ImportError:
        return 0
    return TritonBackend.widest(device, dtype)


def _backend_class(backend: str) -> type[Union[ProductBackend, 'TritonBackend']]:
    """Triton is imported when a GPU first asks for it: it takes its time, and is not there on every system."""
    if backend == 'products':
        return ProductBackend
    from .triton_backend import TritonBackend
    return TritonBackend


def _choose(backend: str | None, device: torch.device, dtype: torch.dtype, dim: int, inner: int) -> str:
    """The backend asked for, or the fastest that can run. Raises ValueError where it cannot."""
    able = [name for name in BACKENDS if can_run(name, device, dtype, dim, inner)]
    if backend is not None and backend not in able:
        raise ValueError(f"backend={backend!r} does not run {dtype} on {device} with D = {dim} and C' = {inner}: "
                         f'use {" or ".join(map(repr, able))}, or None for the fastest')
    return backend or able[0]


def nonlocal_stage(
        x: Tensor,
        embeddings: list[Tensor],
        w_g: list[Tensor],
        w_z: list[Tensor],
        scale: float,
        recompute: bool = False,
        formulation: str = 'proposed',
        backend: str | None = None,
) -> Tensor:
    """Zᵏ of eq. (8) from Z⁰ = X with A = softmax(s Q Kᵀ). Nothing is NaN where the logits are finite.

    Args:
        x: X, (B, M, C), of any strides, which the result has too.
        embeddings: the weights (D, C) of θ and φ; that of θ alone where φ = θ; none where Q = K = X.
        w_g: k of W_gⁿ, (C', C).
        w_z: k of W_Zⁿ, (C, C').
        scale: s.
        recompute: keep nothing but x for the backward pass, which then goes through the forward pass again, some
            images at a time.
        formulation: 'proposed' applies A - 1 in every sub-block; 'original' applies A, so that one sub-block is the
            block of eq. (1).
        backend: 'triton' (16 bits on a GPU, D and C' up to 128), 'products' (everywhere), or None for the fastest
            that can run.

    Returns:
        Zᵏ, (B, M, C), in x's dtype. A is written out where its gradient is to be differentiated again
        (create_graph=True), and where a transform of `torch.func` or forward mode is active.

    Raises:
        TypeError: x and the weights differ in dtype outside autocast.
        ValueError: an unknown formulation, or a backend that is unknown or does not take the case.
        RuntimeError: x and the weights are on different devices.

    Example:
        >>> x, w_g, w_z = torch.randn(2, 9, 4), torch.randn(2, 4), torch.randn(4, 2)
        >>> z = nonlocal_stage(x, [], [w_g], [w_z], scale=0.5, formulation='original')
        >>> torch.allclose(z, x + torch.softmax(0.5 * x @ x.mT, dim=2) @ x @ (w_z @ w_g).T, atol=1e-4)
        True
    """
    w_in, w_out = torch.cat([*embeddings, *w_g]), torch.cat(w_z, dim=1)
    if x.device != w_in.device:
        raise RuntimeError(f'x is on the device {x.device} and the weights are on {w_in.device}: move one to the other')
    device = x.device.type
    if torch.is_autocast_enabled(device) and w_in.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        w_in, w_out = w_in.to(low), w_out.to(low)
    elif x.dtype != w_in.dtype:
        raise TypeError(f'x is {x.dtype} and the weights are {w_in.dtype}: use autocast, or give both one dtype')
    if formulation not in FORMULATIONS:
        raise ValueError(f'formulation={formulation!r} is unknown: use one of {", ".join(FORMULATIONS)}')
    inner, dim = w_g[0].shape[0], embeddings[0].shape[0] if embeddings else w_in.shape[1]
    if transforming():
        with torch.autocast(device, enabled=False):
            return written_out(x, w_in, w_out, inner, len(embeddings), scale, formulation)
    return _stage(
        x, w_in, w_out, inner=inner, embeddings=len(embeddings), scale=scale, formulation=formulation,
        backend=_choose(backend, w_in.device, w_in.dtype, dim, inner), recompute=recompute,
        needs_grad=torch.is_grad_enabled() and (x.requires_grad or w_in.requires_grad or w_out.requires_grad))[0]


def transforming() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is going on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Call:
    """What forward and backward share: the backend, the weights in its dtype, and the division of the batch."""

    def __init__(self, x: Tensor, w_in: Tensor, w_out: Tensor, *, inner: int, embeddings: int, scale: float,
                 formulation: str, backend: str, recompute: bool):
        batch, self.positions, channels = x.shape
        self.maps = w_out.shape[1]  # k C'
        self.embedded = len(w_in) - self.maps
        self.dim = self.embedded // embeddings if embeddings else channels
        positions = max(1, self.positions)  # an empty grid has no chunk, so that no backend sees it
        self.backend = _backend_class(backend)(w_in, positions, inner, scale, formulation)
        self.w_in, self.w_out = w_in.to(self.backend.dtype), w_out.to(self.backend.dtype)
        self.t = self.w_in[self.embedded:] @ self.w_out  # (k C', k C'): Tₙₘ = W_gⁿ W_Zᵐ for all n and m
        images = self.backend.images
        if recompute:
            columns = 2 * len(w_in) + (self.backend.halves + 1) * self.maps + 2 * self.dim + channels
            images = min(images, max(1, RECOMPUTE_BYTES // (positions * columns * self.backend.dtype.itemsize)))
        count = -(-batch // images) if self.positions else 0
        self.chunks = [slice(batch * i // count, batch * (i + 1) // count) for i in range(count)]
        self.largest = max((chunk.stop - chunk.start for chunk in self.chunks), default=0)

    def empty(self, images: int, width: int) -> Tensor:
        return self.w_in.new_empty(images, self.positions, width)

    def new_buffers(self, images: int) -> tuple[Tensor, Tensor, Tensor]:
        """For X W_inᵀ, which is Q, K and G; for H; for what is noted about the rows of A."""
        return (self.empty(images, len(self.w_in)), self.empty(images, self.backend.halves * self.maps),
                self.w_in.new_empty(images, self.positions, self.backend.stats_per_row, dtype=torch.float32))

    def split(self, x: Tensor, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of Q, K and G."""
        q = projected[:, :, :self.dim] if self.embedded else x
        k = projected[:, :, self.dim:self.embedded] if self.embedded > self.dim else q
        return q, k, projected[:, :, self.embedded:]

    def forward(self, x: Tensor, projected: Tensor, h: Tensor, row_stats: Tensor) -> Tensor:
        """Fills the buffers and gives Zᵏ - X, all in the backend's dtype, with G in the place of G⁰."""
        torch.matmul(x, self.w_in.T, out=projected)
        self.backend.forward(*self.split(x, projected), h, row_stats, self.t)
        return h[:, :, :self.maps] @ self.w_out.T

    def backward(self, dz: Tensor, x: Tensor, projected: Tensor, h: Tensor, row_stats: Tensor, d_projected: Tensor,
                 dh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From dZᵏ to the gradients of Zᵏ - X by X, W_in, W_out and T, by way of the last two arguments."""
        torch.matmul(dz, self.w_out, out=dh)
        dq, dk, dg = self.split(x.new_empty(x.shape), d_projected)
        if self.embedded <= self.dim:
            dk = dq.new_empty(dq.shape)
        self.backend.backward(*self.split(x, projected), h, row_stats, self.t, dh, dq, dk, dg)
        if self.embedded == self.dim:
            dq += dk  # φ = θ
        dx = d_projected @ self.w_in
        if not self.embedded:
            dx += dq + dk  # Q = K = X
        d_projected, x, dz, h, dg = (z.flatten(0, 1) for z in (d_projected, x, dz, h[:, :, :self.maps], dg))
        return dx, d_projected.T @ x, dz.T @ h, dg.T @ h


def _operator(function: Callable[..., Any]) -> CustomOpDef:
    """The operator timm_nonlocal::NAME of a function _NAME.

    Where the package is imported again it is the one of before: networks that were made before still call it.
    """
    name = function.__name__.removeprefix('_')
    before = OPDEFS.get(f'timm_nonlocal::{name}')
    if before:
        flop_registry.pop(getattr(torch.ops.timm_nonlocal, name), None)
    return before or torch.library.custom_op(f'timm_nonlocal::{name}', function, mutates_args=())


@_operator
def _stage(
        x: Tensor, w_in: Tensor, w_out: Tensor, inner: int, embeddings: int, scale: float, formulation: str,
        backend: str, recompute: bool, needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zᵏ, and what `_stage_backward` goes on with (of no image if nothing needs a gradient or it recomputes)."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        call = _Call(x, w_in, w_out, inner=inner, embeddings=embeddings, scale=scale, formulation=formulation,
                     backend=backend, recompute=recompute)
        z, kept = torch.empty_like(x), needs_grad and not recompute
        buffers = call.new_buffers(len(x) if kept else call.largest)
        for chunk in call.chunks:
            own = (a[chunk] if kept else a[:chunk.stop - chunk.start] for a in buffers)
            torch.add(x[chunk], call.forward(x[chunk].to(call.backend.dtype), *own), out=z[chunk])
        return z, *(buffers if kept else call.new_buffers(0))


@_operator
def _stage_backward(
        dz: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, projected: Tensor, h: Tensor, row_stats: Tensor,
        inner: int, embeddings: int, scale: float, formulation: str, backend: str, recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `_stage` with respect to x, w_in and w_out, from what it kept or from x alone."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        call = _Call(x, w_in, w_out, inner=inner, embeddings=embeddings, scale=scale, formulation=formulation,
                     backend=backend, recompute=recompute)
        kept = len(projected) == len(x)
        buffers = (projected, h, row_stats) if kept else call.new_buffers(call.largest)
        gradients = call.empty(call.largest, len(w_in)), call.empty(call.largest, call.maps)
        dx = torch.empty_like(x)
        sums = torch.promote_types(call.backend.dtype, torch.float32)
        totals = [torch.zeros_like(w, dtype=sums) for w in (call.w_in, call.w_out, call.t)]
        for chunk in call.chunks:
            count = chunk.stop - chunk.start
            dz_chunk, x_chunk = (a[chunk].to(call.backend.dtype) for a in (dz, x))
            own = [a[chunk] if kept else a[:count] for a in buffers]
            if not kept:
                call.forward(x_chunk, *own)
            dx_chunk, *d_weights = call.backward(dz_chunk, x_chunk, *own, *(a[:count] for a in gradients))
            torch.add(dz[chunk], dx_chunk, out=dx[chunk])
            for total, d_weight in zip(totals, d_weights, strict=True):
                total += d_weight
        dw_in, dw_out, dt = totals
        k = call.maps // inner
        dt.view(k, inner, k, inner).mul_(dt.new_ones(k, k).tril(-1)[:, None, :, None])  # Tₙₘ is read for m < n only
        dw_in[call.embedded:] += dt @ call.w_out.T.to(sums)
        dw_out += call.w_in[call.embedded:].T.to(sums) @ dt
        return dx, dw_in.to(w_in.dtype), dw_out.to(w_out.dtype)


@_stage.register_fake
def _(x: Tensor, w_in: Tensor, w_out: Tensor, inner: int, embeddings: int, scale: float, formulation: str,
      backend: str, recompute: bool, needs_grad: bool) -> tuple[Tensor, ...]:
    (batch, positions, _), (width, maps) = x.shape, (len(w_in), w_out.shape[1])
    kind = _backend_class(backend)
    dtype = kind.operands(w_in)
    kept = (width, dtype), (kind.halves * maps, dtype), (kind.stats_per_row, torch.float32)
    return torch.empty_like(x), *(
        w_in.new_empty(batch if needs_grad and not recompute else 0, positions, columns, dtype=dtype)
        for columns, dtype in kept)


@_stage_backward.register_fake
def _(dz: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(w_in), torch.empty_like(w_out)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_in, w_out, *options, _ = inputs
    ctx.options = dict(zip(OPTIONS, options, strict=True))
    ctx.set_materialize_grads(False)  # what is kept has none
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, w_in, w_out, *kept)


def _differentiate(ctx: Any, dz: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dz is None:
        return (None,) * 10
    if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated again
        return *_differentiable_gradient(dz, *ctx.saved_tensors[:3], **ctx.options), *[None] * 7
    return *_stage_backward(dz, *ctx.saved_tensors, **ctx.options), *[None] * 7


def _differentiable_gradient(dz: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, inner: int, embeddings: int,
                             scale: float, formulation: str, **others: Any) -> list[Tensor | None]:
    """What `_stage_backward` gives, through the plain formulas, with A written out."""
    # views, as weights may be made of x: what reaches x through them is not to be counted here
    own = x.view_as(x), w_in.view_as(w_in), w_out.view_as(w_out)
    with torch.autocast(x.device.type, enabled=False):
        z = written_out(*own, inner, embeddings, scale, formulation)
        found = iter(torch.autograd.grad(z, [t for t in own if t.requires_grad], dz, create_graph=True))
    return [next(found) if t.requires_grad else None for t in own]


_stage.register_autograd(_differentiate, setup_context=_save)


def _macs(x: list[int], w_in: list[int], w_out: list[int], inner: int, embeddings: int) -> tuple[int, int, int, int]:
    """Multiply-adds of Q Kᵀ, of one A Gⁿ each for all n, of the outer and of the inner maps."""
    (batch, positions, channels), (width, _), (_, maps) = x, w_in, w_out
    dim = (width - maps) // embeddings if embeddings else channels
    pairs = (maps // inner) * (maps // inner - 1) // 2
    return (batch * positions ** 2 * dim, batch * positions ** 2 * maps, batch * positions * channels * (width + maps),
            pairs * inner ** 2 * (batch * positions + channels))


@register_flop_formula(torch.ops.timm_nonlocal.stage)
def _(x: list[int], w_in: list[int], w_out: list[int], inner: int, embeddings: int, *_: Any, **__: Any) -> int:
    return 2 * sum(_macs(x, w_in, w_out, inner, embeddings))


@register_flop_formula(torch.ops.timm_nonlocal.stage_backward)
def _(dz: list[int], x: list[int], w_in: list[int], w_out: list[int], projected: list[int], h: list[int],
      row_stats: list[int], inner: int, embeddings: int, *_: Any, **__: Any) -> int:
    logits, applied, outer, inner_maps = _macs(x, w_in, w_out, inner, embeddings)
    forward = logits if projected[0] == x[0] else logits + applied + outer + inner_maps  # A is made again
    return 2 * (forward + 2 * (logits + applied + outer + inner_maps))
