"""The nonlocal stage with a softmax affinity, eq. (8), and the block of eq. (1), as one differentiable operator.

Zᵏ = X + Σₙ Hⁿ W_Zⁿᵀ, where a backend (`products`, `triton_backend`) makes the Hⁿ with everything C' wide. No M×M matrix
is kept for the backward pass: it makes A again, and closes with one pass for Q and K whatever k is, since
dA = [dH¹…dHᵏ][G¹…Gᵏ]ᵀ.

Shapes: B images, M positions, C channels, D embedding channels, k sub-blocks of C' channels each.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .products import ProductBackend

__all__ = ['BACKENDS', 'can_run_triton', 'nonlocal_stage']

BACKENDS = 'products', 'triton'
RECOMPUTE_BYTES = 48 << 20  # what a chunk of images may take where nothing but x is kept


@functools.cache
def _triton_backend() -> type | None:
    """Imported when a GPU first asks for it: Triton takes its time, and is not there on every system."""
    try:
        from .triton_backend import TritonBackend
    except ImportError:
        return None
    return TritonBackend


def can_run_triton(weight: Tensor, dim: int, inner: int) -> bool:
    """Whether the Triton kernels take weights of this device and dtype with D = dim and C' = inner."""
    triton = _triton_backend() if weight.is_cuda else None
    return triton is not None and triton.supports(weight, dim, inner)


def _chosen(backend: str | None, weight: Tensor, dim: int, inner: int) -> str:
    """The backend that was asked for, or the fastest. Raises ValueError if it cannot run."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f'backend={backend!r} is unknown: use one of {", ".join(BACKENDS)}, or None for the fastest')
    able = backend != 'products' and can_run_triton(weight, dim, inner)
    if backend == 'triton' and not able:
        raise ValueError(f"backend='triton' takes bfloat16 and float16 on a GPU from compute capability 8.0 on, at "
                         f"most 128 wide, not {weight.dtype} on {weight.device} of widths {dim} and {inner}: use "
                         f"'products'")
    return 'triton' if able else 'products'


def nonlocal_stage(
        x: Tensor,
        embeddings: list[Tensor],
        w_g: list[Tensor],
        w_z: list[Tensor],
        scale: float,
        *,
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
        backend: 'products', 'triton' (see `can_run_triton`) or None for the fastest.

    Raises:
        ValueError: an unknown formulation or backend, or a backend that cannot run here.
        TypeError: x and the weights differ in dtype outside autocast.
        RuntimeError: it is differentiated twice.
    """
    w_in, w_out = torch.cat([*embeddings, *w_g]), torch.cat(w_z, dim=1)
    device = x.device.type
    if torch.is_autocast_enabled(device) and w_in.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        w_in, w_out = w_in.to(low), w_out.to(low)
    elif x.dtype != w_in.dtype:
        raise TypeError(f'x is {x.dtype} and the weights are {w_in.dtype}: use autocast, or give both one dtype')
    if formulation not in ('proposed', 'original'):
        raise ValueError(f"formulation={formulation!r} is unknown: use 'proposed' or 'original'")
    inner = w_g[0].shape[0]
    backend = _chosen(backend, w_in, embeddings[0].shape[0] if embeddings else x.shape[-1], inner)
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or w_in.requires_grad or w_out.requires_grad)
    return _stage(x, w_in, w_out, inner=inner, embeddings=len(embeddings), scale=scale, formulation=formulation,
                  backend=backend, needs_grad=needs_grad, recompute=recompute)[0]


class _Call:
    """What forward and backward share: the backend, the weights in its dtype, and the chunks of the batch."""

    def __init__(self, x: Tensor, w_in: Tensor, w_out: Tensor, *, inner: int, embeddings: int, scale: float,
                 formulation: str, backend: str, recompute: bool):
        batch, self.positions, channels = x.shape
        self.maps = w_out.shape[1]  # k C'
        self.embedded = len(w_in) - self.maps
        self.dim = self.embedded // embeddings if embeddings else channels
        kind = ProductBackend if backend == 'products' else _triton_backend()
        self.backend = kind(w_in, self.positions, inner, scale, formulation)
        self.w_in, self.w_out = w_in.to(self.backend.dtype), w_out.to(self.backend.dtype)
        self.t = self.w_in[self.embedded:] @ self.w_out  # (k C', k C'): Tₙₘ = W_gⁿ W_Zᵐ for all n and m
        images = self.backend.images
        if recompute:
            columns = 2 * len(w_in) + (self.backend.halves + 1) * self.maps + 2 * self.dim + channels
            images = min(images, max(1, RECOMPUTE_BYTES // (self.positions * columns * self.backend.dtype.itemsize)))
        count = -(-batch // images)
        self.chunks = [slice(batch * i // count, batch * (i + 1) // count) for i in range(count)]
        self.largest = max((chunk.stop - chunk.start for chunk in self.chunks), default=0)

    def empty(self, images: int, width: int) -> Tensor:
        return self.w_in.new_empty(images, self.positions, width)

    def buffers(self, images: int) -> tuple[Tensor, Tensor, Tensor]:
        """For X W_inᵀ, which is Q, K and G; for H; for what the backend notes about the rows of A."""
        return (self.empty(images, len(self.w_in)), self.empty(images, self.backend.halves * self.maps),
                self.w_in.new_empty(images, self.positions, self.backend.statistics, dtype=torch.float32))

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


@torch.library.custom_op('timm_nonlocal::stage', mutates_args=())
def _stage(
        x: Tensor, w_in: Tensor, w_out: Tensor, inner: int, embeddings: int, scale: float, formulation: str,
        backend: str, needs_grad: bool, recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zᵏ, and what `_stage_backward` goes on with (of no image where nothing needs it, or it recomputes)."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        call = _Call(x, w_in, w_out, inner=inner, embeddings=embeddings, scale=scale, formulation=formulation,
                     backend=backend, recompute=recompute)
        z, keep = torch.empty_like(x), needs_grad and not recompute
        buffers = call.buffers(len(x) if keep else call.largest)
        for chunk in call.chunks:
            state = (a[chunk] if keep else a[:chunk.stop - chunk.start] for a in buffers)
            torch.add(x[chunk], call.forward(x[chunk].to(call.backend.dtype), *state), out=z[chunk])
        return z, *(buffers if keep else call.buffers(0))


@torch.library.custom_op('timm_nonlocal::stage_backward', mutates_args=())
def _stage_backward(
        dz: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, projected: Tensor, h: Tensor, row_stats: Tensor,
        inner: int, embeddings: int, scale: float, formulation: str, backend: str, recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `_stage` with respect to x, w_in and w_out, from what it kept or from x alone."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        call = _Call(x, w_in, w_out, inner=inner, embeddings=embeddings, scale=scale, formulation=formulation,
                     backend=backend, recompute=recompute)
        kept = len(projected) == len(x)
        buffers = (projected, h, row_stats) if kept else call.buffers(call.largest)
        for_gradients = call.empty(call.largest, len(w_in)), call.empty(call.largest, call.maps)
        dx = torch.empty_like(x)
        sums = torch.promote_types(call.backend.dtype, torch.float32)
        totals = [torch.zeros_like(w, dtype=sums) for w in (call.w_in, call.w_out, call.t)]
        for chunk in call.chunks:
            count = chunk.stop - chunk.start
            dz_chunk, x_chunk = (a[chunk].to(call.backend.dtype) for a in (dz, x))
            state = [a[chunk] if kept else a[:count] for a in buffers]
            if not kept:
                call.forward(x_chunk, *state)
            dx_chunk, *d_weights = call.backward(dz_chunk, x_chunk, *state, *(a[:count] for a in for_gradients))
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
      backend: str, needs_grad: bool, recompute: bool) -> tuple[Tensor, ...]:
    (batch, positions, _), (width, maps) = x.shape, (len(w_in), w_out.shape[1])
    kind = ProductBackend if backend == 'products' else _triton_backend()
    dtype, images = kind.operands(w_in), batch if needs_grad and not recompute else 0
    kept = (width, dtype), (kind.halves * maps, dtype), (kind.statistics, torch.float32)
    return torch.empty_like(x), *(w_in.new_empty(images, positions, columns, dtype=dtype) for columns, dtype in kept)


@_stage_backward.register_fake
def _(dz: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(w_in), torch.empty_like(w_out)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, w_in, w_out, *ctx.options, _, ctx.recompute = inputs
    ctx.set_materialize_grads(False)  # what is kept has none
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, w_in, w_out, *kept)


def _differentiate(ctx: Any, dz: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dz is None:
        return (None,) * 10
    return *_stage_backward(dz, *ctx.saved_tensors, *ctx.options, ctx.recompute), *[None] * 7


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError('nonlocal blocks have no second derivative in their merged form: use merged=False')


_stage.register_autograd(_differentiate, setup_context=_save)
_stage_backward.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


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
