"""The backend by matrix products, on any device: A is made for a few images or rows at a time.

    Gⁿ = G⁰ⁿ + Σ_{m<n} Hᵐ Tₙₘᵀ,   Hⁿ = A Gⁿ - Gⁿ,   A = softmax(s Q Kᵀ)

On the CPU what counts is that A stays in the cache and that its buffer is used again: fresh pages of memory cost more
than the arithmetic done on them. On a GPU the blocks only bound the memory.

Shapes: b images, M positions, D embedding channels, k sub-blocks of C' channels each.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ['ProductBackend']

BLOCK_BYTES = {'cpu': 4 << 20, 'cuda': 128 << 20}  # of one block of rows, or of all images of a chunk, a CPU thread
CHUNK = 4  # times as many images go through the maps outside of the backend at once: fewer, larger products
REUSE_BYTES = {'cpu': 64 << 20, 'cuda': 128 << 20}  # A is made once for all sub-blocks up to this size, else for each


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by instructions of its own: else float32 is faster."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN is to multiply float32 on the CPU: on AMD's, where MKL has half its speed (BENCHMARKS.md)."""
    cpuinfo = Path('/proc/cpuinfo')
    return (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
            and cpuinfo.is_file() and 'AuthenticAMD' in cpuinfo.read_text())


def linear_product(a: Tensor, b: Tensor) -> Tensor:
    """a b for a (i, j) and b (j, l) by oneDNN, through torch's operator of linear layers: x wᵀ."""
    x, w = (a, b.T) if a.stride(1) == 1 else (b.T, a)  # a large transposed matrix is the faster as the weight
    if not (w.is_contiguous() or w.T.is_contiguous()):
        w = w.contiguous()  # oneDNN has no kernel for a weight with gaps
    product = torch.ops.mkldnn._linear_pointwise(x, w, None, 'none', [], '')
    return product if x is a else product.T


def as_rows(z: Tensor) -> Tensor:
    """(b, M, n) as (b M, n). A copy where a product would read past the end of each row, into what may be NaN.

    oneDNN's kernels for AMX take bfloat16 rows in pieces of 32 and multiply what lies behind the end by zero, which is
    NaN where memory that nothing was written to holds NaN (its issue 5717).
    """
    rows = z.flatten(0, 1)
    return rows.contiguous() if rows.dtype == torch.bfloat16 and not rows.is_cuda and rows.shape[1] % 32 else rows


class ProductBackend:
    """Hⁿ and their gradients in one call of the stage; its buffers are used again for every chunk of images.

    Args:
        like: gives the device and the dtype.
        positions: M.
        inner: C'.
        scale: s.
        formulation: 'proposed' has Hⁿ = A Gⁿ - Gⁿ, 'original' A Gⁿ.

    Attributes:
        dtype: what the tensors given to `forward` and `backward` must have, see `operands`.
        images: how many images `forward` and `backward` take at most.
    """

    stats_per_row = 0  # numbers noted about each row of A
    halves = 1  # of H; a second one would hold what rounding took off it

    @staticmethod
    def operands(like: Tensor) -> torch.dtype:
        """bfloat16 and float16 are multiplied as they are where the device does so, else as float32."""
        native = like.is_cuda or (like.dtype == torch.bfloat16 and multiplies_bfloat16())
        return like.dtype if native else torch.promote_types(like.dtype, torch.float32)

    def __init__(self, like: Tensor, positions: int, inner: int, scale: float, formulation: str = 'proposed'):
        self.device, device = like.device, 'cuda' if like.is_cuda else 'cpu'
        self.dtype = self.operands(like)
        self.sums = torch.promote_types(self.dtype, torch.float32) if like.is_cuda else self.dtype
        self.inner, self.scale, self.minus = inner, scale, int(formulation == 'proposed')
        row = positions * self.sums.itemsize
        block = BLOCK_BYTES[device] * (1 if like.is_cuda else torch.get_num_threads())
        step = max(1, min(positions, block // row))
        self.blocks = [slice(first, min(first + step, positions)) for first in range(0, positions, step)]
        self.one_by_one = self.dtype == torch.float32 and device == 'cpu' and onednn_is_faster()
        self.together = 1 if self.one_by_one else max(1, block // (positions * row))
        self.images = self.together * (1 if like.is_cuda else CHUNK)
        self.reuse = positions * row <= REUSE_BYTES[device]
        self.buffers: dict[str, Tensor] = {}

    def forward(self, q: Tensor, k: Tensor, g: Tensor, h: Tensor, row_stats: Tensor, t: Tensor) -> None:
        """Turns G⁰ into G, and writes H.

        Args:
            q, k: (b, M, D).
            g: (b, M, k C'), G⁰ before and G after.
            h: (b, M, `halves` k C'), written.
            row_stats: (b, M, `stats_per_row`) float32, written where there are any.
            t: (k C', k C'), the inner maps Tₙₘ = W_gⁿ W_Zᵐ, of which those with m < n are read.
        """
        for images in zip(*(z.split(self.together) for z in (q, k, g, h)), strict=True):
            self._forward(t, *images)

    def backward(
            self, q: Tensor, k: Tensor, g: Tensor, h: Tensor, row_stats: Tensor, t: Tensor,
            dh: Tensor, dq: Tensor, dk: Tensor, dg: Tensor,
    ) -> None:
        """The gradients with respect to Q, K and G⁰; those of Q and K in the last of the k passes over A.

        Args:
            q, k, g, h, row_stats, t: as `forward` took and left them.
            dh: (b, M, k C'), the gradient that reaches H from outside; what reaches it from later sub-blocks is added.
            dq, dk: (b, M, D), written.
            dg: (b, M, k C'), written.
        """
        for images in zip(*(z.split(self.together) for z in (q, k, g, dh, dq, dk, dg)), strict=True):
            self._backward(t, *images)

    def _forward(self, t: Tensor, q: Tensor, k: Tensor, g: Tensor, h: Tensor) -> None:
        affinity = self._affinity(q, k, again=g.shape[2] > self.inner)
        for n in range(0, g.shape[2], self.inner):
            g_n, h_n = (z[:, :, n:n + self.inner] for z in (g, h))
            if n:
                g_n.view(-1, self.inner).addmm_(as_rows(h[:, :, :n]), t[n:n + self.inner, :n].T)
            for block in self.blocks:
                self._subtract(affinity(block), g_n, g_n[:, block], h_n[:, block])

    def _backward(self, t: Tensor, q: Tensor, k: Tensor, g: Tensor, dh: Tensor, dq: Tensor, dk: Tensor,
                  dg: Tensor) -> None:
        affinity = self._affinity(q, k, again=g.shape[2] > self.inner)
        columns, whole = g.contiguous().transpose(1, 2), len(self.blocks) == 1  # (b, k C', M)
        dk_sum = None  # (b, M, D)
        for n in reversed(range(0, g.shape[2], self.inner)):
            end = n + self.inner
            dh_n, dg_n = dh[:, :, n:end], dg[:, :, n:end]
            if end < g.shape[2]:
                dh_n.view(-1, self.inner).addmm_(as_rows(dg[:, :, end:]), t[end:, n:end])
            back = None  # Aᵀ dHⁿ, (b, M, C'), summed over the rows of A
            for block in self.blocks:
                a = affinity(block)
                if whole:
                    self._subtract(a.transpose(1, 2), dh_n, dh_n, dg_n)
                else:
                    back = self._add(back, a.transpose(1, 2), dh_n[:, block])
                if n == 0:  # dH is whole now
                    ds = self._logit_gradient(a, dh[:, block], columns)
                    self._put(ds, k, dq[:, block])
                    if whole:
                        self._put(ds.transpose(1, 2), q, dk)
                    else:
                        dk_sum = self._add(dk_sum, ds.transpose(1, 2), q[:, block])
            if back is not None:
                torch.sub(back, dh_n, alpha=self.minus, out=dg_n)
        if dk_sum is not None:
            torch.mul(dk_sum, self.scale, out=dk)

    def _affinity(self, q: Tensor, k: Tensor, again: bool) -> Callable[[slice], Tensor]:
        """A by its rows: (b, rows, M) in `dtype`, good until the next rows are asked for.

        Args:
            again: every row will be asked for more than once.
        """
        b, m, _ = q.shape
        reuse, made = again and self.reuse, set()

        def affinity(block: slice) -> Tensor:
            shape = (b, m, m) if reuse else (b, block.stop - block.start, m)
            a = self._buffer('a', shape, self.dtype)
            a = a[:, block] if reuse else a
            if block.start not in made:
                if self.dtype == self.sums:
                    logits = self._product(q[:, block], k.transpose(1, 2), self.scale, out=a)
                    torch.softmax(logits, dim=2, out=a)  # of bfloat16 in float32 inside
                else:
                    logits = self._product(q[:, block], k.transpose(1, 2), self.scale)
                    a.copy_(torch.softmax(logits, dim=2, out=logits))
                if reuse:
                    made.add(block.start)
            return a

        return affinity

    def _logit_gradient(self, a: Tensor, dh: Tensor, columns: Tensor) -> Tensor:
        """dA = [dH¹…dHᵏ][G¹…Gᵏ]ᵀ taken through the softmax, for some rows: (b, rows, M), good until the next."""
        da = self._product(dh, columns, out=None if self.one_by_one else self._buffer('da', a.shape, self.sums))
        if a.dtype != self.sums:
            a = a.to(self.sums)
            a /= a.sum(dim=2, keepdim=True)  # rounding has left rows that do not sum to one
        return torch.ops.aten._softmax_backward_data.out(da, a, 2, self.sums, grad_input=da).to(self.dtype)

    def _subtract(self, a: Tensor, b: Tensor, c: Tensor, out: Tensor) -> None:
        """a b - c in the proposed formulation, a b in the original one."""
        if self.dtype == self.sums and not self.one_by_one:
            torch.baddbmm(c, a, b, beta=-self.minus, out=out)
        else:
            torch.sub(self._product(a, b), c, alpha=self.minus, out=out)

    def _put(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """s a b."""
        product = self._product(a, b, self.scale, out)
        if product is not out:
            out.copy_(product)

    def _add(self, total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """total + a b, in float32 or more where there is a sum; a b where there is none yet."""
        product = self._product(a, b)
        return product if total is None else total.to(torch.promote_types(total.dtype, torch.float32)).add_(product)

    def _product(self, a: Tensor, b: Tensor, scale: float = 1.0, out: Tensor | None = None) -> Tensor:
        """scale a b for a (b, i, j) and b (b, j, l), summed in float32 or more and returned in `sums`.

        Args:
            out: where the result may be written.
        """
        if self.one_by_one:
            return linear_product(a[0], b[0] if scale == 1 else b[0] * scale).unsqueeze(0)  # b is never the larger
        if self.dtype == self.sums:
            out = a.new_empty(a.shape[0], a.shape[1], b.shape[2]) if out is None else out
            return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
        product = torch.bmm(a, b, out_dtype=self.sums) if a.is_cuda else torch.bmm(a.to(self.sums), b.to(self.sums))
        return product.mul_(scale)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An empty tensor that keeps its place in memory from one call to the next, however large each one is."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self.buffers[name][:size].view(shape)
