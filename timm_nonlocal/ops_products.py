"""The chain of a nonlocal stage by matrix products, on any device: A is made for a few images or rows at a time.

    Gⁿ = G⁰ⁿ + Σ_{m<n} Hᵐ Tₙₘᵀ,   Hⁿ = A Gⁿ - Gⁿ,   A = softmax(s Q Kᵀ)

On the CPU what counts is that A stays in the cache and that its buffer is used again: fresh pages of memory cost more
than the arithmetic done on them. On a GPU the blocks only bound the memory.

Shapes: b images, M positions, D embedding channels, k sub-blocks of C' channels each.
"""

import math
from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

BLOCK_BYTES = {'cpu': 4 << 20, 'cuda': 128 << 20}  # of one block of rows, or of all images of a chunk, a CPU thread
KEEP_BYTES = {'cpu': 64 << 20, 'cuda': 128 << 20}  # A is made once for all sub-blocks up to this size, else for each


class ProductChain:
    """The chain of one call of the stage; its buffers are used again for every chunk of images.

    Args:
        like: gives the device and the dtype.
        positions: M.
        inner: C'.
        scale: s.
        difference: Hⁿ = A Gⁿ - Gⁿ; False takes A Gⁿ.

    Attributes:
        dtype: what the tensors given to `forward` and `backward` must have, see `operands`.
        images: how many images `forward` and `backward` take at most.
    """

    statistics = 0  # numbers noted about each row of A
    halves = 1  # of H; a second one would hold what rounding took off it

    @staticmethod
    def operands(like: Tensor) -> torch.dtype:
        """bfloat16 and float16 are multiplied as they are on a GPU, summed in float32, and as float32 on the CPU."""
        return like.dtype if like.is_cuda else torch.promote_types(like.dtype, torch.float32)

    def __init__(self, like: Tensor, positions: int, inner: int, scale: float, difference: bool = True):
        self.device, device = like.device, 'cuda' if like.is_cuda else 'cpu'
        self.dtype = self.operands(like)
        self.sums = torch.promote_types(self.dtype, torch.float32)
        self.inner, self.scale, self.minus = inner, scale, int(difference)
        row = positions * self.sums.itemsize
        block = BLOCK_BYTES[device] * (1 if like.is_cuda else torch.get_num_threads())
        step = max(1, min(positions, block // row))
        self.blocks = [slice(first, min(first + step, positions)) for first in range(0, positions, step)]
        self.images = max(1, block // (positions * row))
        self.keep = positions * row <= KEEP_BYTES[device]
        self.buffers: dict[str, Tensor] = {}

    def forward(self, q: Tensor, k: Tensor, g: Tensor, h: Tensor, rows: Tensor, t: Tensor) -> None:
        """Turns G⁰ into G, and writes H.

        Args:
            q, k: (b, M, D).
            g: (b, M, k C'), G⁰ before and G after.
            h: (b, M, `halves` k C'), written.
            rows: (b, M, `statistics`) float32, written where there are any.
            t: (k C', k C'), the inner maps Tₙₘ = W_gⁿ W_Zᵐ, of which those with m < n are read.
        """
        affinity = self._affinity(q, k, again=g.shape[2] > self.inner)
        for n in range(0, g.shape[2], self.inner):
            g_n, h_n = (z[:, :, n:n + self.inner] for z in (g, h))
            if n:
                g_n += h[:, :, :n] @ t[n:n + self.inner, :n].T
            for block in self.blocks:
                torch.sub(self._product(affinity(block), g_n), g_n[:, block], alpha=self.minus, out=h_n[:, block])

    def backward(
            self, q: Tensor, k: Tensor, g: Tensor, h: Tensor, rows: Tensor, t: Tensor,
            dh: Tensor, dq: Tensor, dk: Tensor, dg: Tensor,
    ) -> None:
        """The gradients with respect to Q, K and G⁰; those of Q and K in the last of the k passes over A.

        Args:
            q, k, g, h, rows, t: as `forward` took and left them.
            dh: (b, M, k C'), the gradient that reaches H from outside; what reaches it inside the chain is added.
            dq, dk: (b, M, D), written.
            dg: (b, M, k C'), written.
        """
        affinity = self._affinity(q, k, again=g.shape[2] > self.inner)
        dk_columns = None  # (b, D, M)
        for n in reversed(range(0, g.shape[2], self.inner)):
            end = n + self.inner
            dh_n = dh[:, :, n:end]
            if end < g.shape[2]:
                dh_n += dg[:, :, end:] @ t[end:, n:end]
            back = None  # (Aᵀ dHⁿ)ᵀ, (b, C', M): dHⁿᵀ A goes through A row by row
            for block in self.blocks:
                a = affinity(block)
                back = self._product(dh_n[:, block].transpose(1, 2), a, back)
                if n == 0:  # dH is whole now
                    ds = self._logit_gradient(a, dh[:, block], g)
                    torch.mul(self._product(ds, k), self.scale, out=dq[:, block])
                    dk_columns = self._product(q[:, block].transpose(1, 2), ds, dk_columns)
            torch.sub(back.transpose(1, 2), dh_n, alpha=self.minus, out=dg[:, :, n:end])
        torch.mul(dk_columns.transpose(1, 2), self.scale, out=dk)

    def _logit_gradient(self, a: Tensor, dh: Tensor, g: Tensor) -> Tensor:
        """dA = [dH¹…dHᵏ][G¹…Gᵏ]ᵀ taken through the softmax, for some rows: (b, rows, M), good until the next."""
        da = self._buffer('da', a.shape, self.sums)
        da = self._product(dh, g.transpose(1, 2), out=da)
        if a.dtype != self.sums:
            a = a.to(self.sums)
            a /= a.sum(dim=2, keepdim=True)  # rounding has left rows that do not sum to one
        return torch.ops.aten._softmax_backward_data.out(da, a, 2, self.sums, grad_input=da).to(self.dtype)

    def _affinity(self, q: Tensor, k: Tensor, again: bool) -> Callable[[slice], Tensor]:
        """A by its rows: (b, rows, M) in `dtype`, good until the next rows are asked for.

        Args:
            again: every row will be asked for more than once.
        """
        b, m, _ = q.shape
        keep, made = again and self.keep, set()

        def affinity(block: slice) -> Tensor:
            shape = (b, m, m) if keep else (b, block.stop - block.start, m)
            a = self._buffer('a', shape, self.dtype)
            a = a[:, block] if keep else a
            if block.start not in made:
                if self.dtype == self.sums:
                    logits = self._product(q[:, block] * self.scale, k.transpose(1, 2), out=a)
                else:
                    logits = self._product(q[:, block], k.transpose(1, 2)).mul_(self.scale)
                a.copy_(torch.softmax(logits, dim=2, out=logits))
                if keep:
                    made.add(block.start)
            return a

        return affinity

    def _product(self, a: Tensor, b: Tensor, total: Optional[Tensor] = None, out: Optional[Tensor] = None) -> Tensor:
        """a b, or total + a b in place, for a (b, i, j) and b (b, j, l), summed and returned in `sums`.

        Args:
            out: where the result may be written.
        """
        if self.dtype == self.sums:
            return torch.bmm(a, b, out=out) if total is None else total.baddbmm_(a, b)
        product = torch.bmm(a, b, out_dtype=self.sums) if a.is_cuda else torch.bmm(a.to(self.sums), b.to(self.sums))
        return product if total is None else total.add_(product)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An empty tensor that keeps its place in memory from one call to the next, however large each one is."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=dtype, device=self.device)
        return self.buffers[name][:size].view(shape)
