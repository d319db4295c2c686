"""The nonlocal stage with a softmax affinity, eq. (8), and the block of eq. (1), as one differentiable operator.

Zᵏ = X + Σₙ Hⁿ W_Zⁿᵀ, where the Hⁿ come from a chain that is C' wide (`ops_products`, `ops_triton`). No M×M matrix is
kept for the backward pass: it makes A again, and closes with one pass for Q and K whatever k is, since
dA = [dH¹…dHᵏ][G¹…Gᵏ]ᵀ.

Shapes: B images, M positions, C channels, D embedding channels, k sub-blocks of C' channels each.
"""

import functools
from typing import Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .products import ProductChain

FRUGAL_BYTES = 48 << 20  # what a chunk of images may take where nothing but x is kept
USE_TRITON = True  # False chooses matrix products on every device


def choose_chain(weight: Tensor, dim: int, inner: int) -> type:
    """The fastest chain for a device and dtype, D and C': kernels of our own on a GPU, else matrix products."""
    if USE_TRITON and weight.is_cuda and (chain := _triton_chain()) and chain.supports(weight, dim, inner):
        return chain
    return ProductChain


@functools.cache
def _triton_chain() -> Optional[type]:
    """Imported when a GPU first asks for it: Triton takes its time, and is not there on every system."""
    try:
        from .triton_backend import TritonChain
    except ImportError:
        return None
    return TritonChain


def nonlocal_stage(
        x: Tensor,
        embeddings: list[Tensor],
        w_g: list[Tensor],
        w_z: list[Tensor],
        scale: float,
        recompute: bool = False,
        difference: bool = True,
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
        difference: apply A - 1 in every sub-block; False applies A, so that one sub-block is the block of eq. (1).

    Raises:
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
    train = torch.is_grad_enabled() and (x.requires_grad or w_in.requires_grad or w_out.requires_grad)
    return _stage(x, w_in, w_out, w_g[0].shape[0], len(embeddings), scale, difference, train and not recompute,
                  recompute)[0]


class _Call:
    """What forward and backward share: the chain, the weights in its dtype, and the division of the batch."""

    def __init__(self, x: Tensor, w_in: Tensor, w_out: Tensor, inner: int, embeddings: int, scale: float,
                 difference: bool, frugal: bool):
        batch, self.positions, channels = x.shape
        self.maps = w_out.shape[1]  # k C'
        self.embedded = len(w_in) - self.maps
        self.dim = self.embedded // embeddings if embeddings else channels
        self.chain = choose_chain(w_in, self.dim, inner)(w_in, self.positions, inner, scale, difference)
        self.w_in, self.w_out = w_in.to(self.chain.dtype), w_out.to(self.chain.dtype)
        self.t = self.w_in[self.embedded:] @ self.w_out  # (k C', k C'): Tₙₘ = W_gⁿ W_Zᵐ for all n and m
        images = self.chain.images
        if frugal:
            columns = 2 * len(w_in) + (self.chain.halves + 1) * self.maps + 2 * self.dim + channels
            images = min(images, max(1, FRUGAL_BYTES // (self.positions * columns * self.chain.dtype.itemsize)))
        chunks = -(-batch // images)
        self.parts = [slice(batch * i // chunks, batch * (i + 1) // chunks) for i in range(chunks)]
        self.largest = max((part.stop - part.start for part in self.parts), default=0)

    def empty(self, images: int, width: int) -> Tensor:
        return self.w_in.new_empty(images, self.positions, width)

    def room(self, images: int) -> tuple[Tensor, Tensor, Tensor]:
        """For X W_inᵀ, which is Q, K and G; for H; for what the chain notes about the rows of A."""
        return (self.empty(images, len(self.w_in)), self.empty(images, self.chain.halves * self.maps),
                self.w_in.new_empty(images, self.positions, self.chain.statistics, dtype=torch.float32))

    def split(self, x: Tensor, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of Q, K and G."""
        q = projected[:, :, :self.dim] if self.embedded else x
        k = projected[:, :, self.dim:self.embedded] if self.embedded > self.dim else q
        return q, k, projected[:, :, self.embedded:]

    def forward(self, x: Tensor, projected: Tensor, h: Tensor, rows: Tensor) -> Tensor:
        """Fills the room and gives Zᵏ - X, all in the chain's dtype, with G in the place of G⁰."""
        torch.matmul(x, self.w_in.T, out=projected)
        self.chain.forward(*self.split(x, projected), h, rows, self.t)
        return h[:, :, :self.maps] @ self.w_out.T

    def backward(self, dz: Tensor, x: Tensor, projected: Tensor, h: Tensor, rows: Tensor, d_projected: Tensor,
                 dh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From dZᵏ to the gradients of Zᵏ - X by X, W_in, W_out and T, by way of the last two arguments."""
        torch.matmul(dz, self.w_out, out=dh)
        dq, dk, dg = self.split(x.new_empty(x.shape), d_projected)
        if self.embedded <= self.dim:
            dk = dq.new_empty(dq.shape)
        self.chain.backward(*self.split(x, projected), h, rows, self.t, dh, dq, dk, dg)
        if self.embedded == self.dim:
            dq += dk  # φ = θ
        dx = d_projected @ self.w_in
        if not self.embedded:
            dx += dq + dk  # Q = K = X
        d_projected, x, dz, h, dg = (z.flatten(0, 1) for z in (d_projected, x, dz, h[:, :, :self.maps], dg))
        return dx, d_projected.T @ x, dz.T @ h, dg.T @ h


@torch.library.custom_op('timm_nonlocal::stage', mutates_args=())
def _stage(
        x: Tensor, w_in: Tensor, w_out: Tensor, inner: int, embeddings: int, scale: float, difference: bool, keep: bool,
        frugal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Zᵏ, and what `_stage_backward` goes on with (of no image unless keep is set)."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        call = _Call(x, w_in, w_out, inner, embeddings, scale, difference, frugal)
        z = torch.empty_like(x)
        room = call.room(len(x) if keep else call.largest)
        for part in call.parts:
            state = (a[part] if keep else a[:part.stop - part.start] for a in room)
            torch.add(x[part], call.forward(x[part].to(call.chain.dtype), *state), out=z[part])
        return z, *(room if keep else call.room(0))


@torch.library.custom_op('timm_nonlocal::stage_backward', mutates_args=())
def _stage_backward(
        dz: Tensor, x: Tensor, w_in: Tensor, w_out: Tensor, projected: Tensor, h: Tensor, rows: Tensor,
        inner: int, embeddings: int, scale: float, difference: bool, frugal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `_stage` with respect to x, w_in and w_out, from what it kept or from x alone."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        call = _Call(x, w_in, w_out, inner, embeddings, scale, difference, frugal)
        kept = len(projected) == len(x)
        room = (projected, h, rows) if kept else call.room(call.largest)
        room_for_gradients = call.empty(call.largest, len(w_in)), call.empty(call.largest, call.maps)
        dx = torch.empty_like(x)
        sums = torch.promote_types(call.chain.dtype, torch.float32)
        totals = [torch.zeros_like(w, dtype=sums) for w in (call.w_in, call.w_out, call.t)]
        for part in call.parts:
            count = part.stop - part.start
            dz_part, x_part = (a[part].to(call.chain.dtype) for a in (dz, x))
            state = [a[part] if kept else a[:count] for a in room]
            if not kept:
                call.forward(x_part, *state)
            dx_part, *d_weights = call.backward(dz_part, x_part, *state, *(a[:count] for a in room_for_gradients))
            torch.add(dz[part], dx_part, out=dx[part])
            for total, d_weight in zip(totals, d_weights, strict=True):
                total += d_weight
        dw_in, dw_out, dt = totals
        k = call.maps // inner
        dt.view(k, inner, k, inner).mul_(dt.new_ones(k, k).tril(-1)[:, None, :, None])  # Tₙₘ is read for m < n only
        dw_in[call.embedded:] += dt @ call.w_out.T.to(sums)
        dw_out += call.w_in[call.embedded:].T.to(sums) @ dt
        return dx, dw_in.to(w_in.dtype), dw_out.to(w_out.dtype)


@_stage.register_fake
def _(x, w_in, w_out, inner, embeddings, scale, difference, keep, frugal):
    (batch, positions, channels), (width, maps) = x.shape, (len(w_in), w_out.shape[1])
    chain = choose_chain(w_in, (width - maps) // embeddings if embeddings else channels, inner)
    dtype = chain.operands(w_in)
    kept = (width, dtype), (chain.halves * maps, dtype), (chain.statistics, torch.float32)
    return torch.empty_like(x), *(
        w_in.new_empty(batch if keep else 0, positions, columns, dtype=dtype) for columns, dtype in kept)


@_stage_backward.register_fake
def _(dz, x, w_in, w_out, *_):
    return torch.empty_like(x), torch.empty_like(w_in), torch.empty_like(w_out)


def _save(ctx, inputs, output):
    x, w_in, w_out, *ctx.options, _, ctx.frugal = inputs
    ctx.set_materialize_grads(False)  # what is kept has none
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, w_in, w_out, *kept)


def _differentiate(ctx, dz, *_):
    if dz is None:
        return (None,) * 9
    return *_stage_backward(dz, *ctx.saved_tensors, *ctx.options, ctx.frugal), *[None] * 6


def _refuse(ctx, *_):
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
def _(x, w_in, w_out, inner, embeddings, *_, out_shape=None, **__) -> int:
    return 2 * sum(_macs(x, w_in, w_out, inner, embeddings))


@register_flop_formula(torch.ops.timm_nonlocal.stage_backward)
def _(dz, x, w_in, w_out, projected, h, rows, inner, embeddings, *_, out_shape=None, **__) -> int:
    logits, applied, outer, inner_maps = _macs(x, w_in, w_out, inner, embeddings)
    forward = logits if projected[0] == x[0] else logits + applied + outer + inner_maps  # A is made again
    return 2 * (forward + 2 * (logits + applied + outer + inner_maps))
