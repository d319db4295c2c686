"""The backend by Triton kernels, for bfloat16 and float16 on a GPU. Shapes as in `products`."""

from typing import Any

import torch
import triton
from torch import Tensor

from .triton_kernels import FUSION, apply, apply_transposed, close_keys, close_queries

__all__ = ['TILES', 'TritonBackend']

# Tiles by the wider of D and C: rows (or columns) that a program owns, those it takes at a step, warps, and stages of
# software pipelining. The first that fits the GPU's shared memory is used.
TILES = {
    apply: {64: [(64, 64, 4, 3), (64, 64, 4, 2)], 128: [(128, 64, 8, 2), (64, 64, 8, 1), (64, 32, 4, 1)]},
    apply_transposed: {64: [(128, 32, 4, 3), (64, 64, 4, 2)], 128: [(64, 64, 8, 2), (64, 64, 8, 1), (64, 32, 4, 1)]},
    close_keys: {64: [(64, 64, 4, 2), (64, 64, 4, 1), (32, 32, 4, 1)],
                  128: [(64, 64, 8, 1), (64, 32, 8, 1), (32, 32, 4, 1)]},
    close_queries: {64: [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 1), (32, 32, 4, 1)],
                     128: [(64, 64, 8, 1), (64, 32, 8, 1), (32, 32, 4, 1)]},
}
_fitting: dict[tuple, int] = {}  # which tile that was
LOG2_E = 1.4426950408889634


class TritonBackend:
    """Hⁿ and their gradients in one call of the stage, with the interface of `ProductBackend`."""

    stats_per_row = 3  # row_max, row_sum and lse, each in one piece for an image
    halves = 2  # of H: its values and what rounding took off them
    images = 65535  # the limit of a grid

    @staticmethod
    def widest(device: torch.device, dtype: torch.dtype) -> int:
        """The largest D and C', by the registers, for 16 bits on a GPU whose tensor cores know both kinds; else 0."""
        able = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
        return 128 if able and dtype in (torch.bfloat16, torch.float16) else 0

    @staticmethod
    def operands(like: Tensor) -> torch.dtype:
        return like.dtype

    def __init__(self, like: Tensor, positions: int, inner: int, scale: float, formulation: str = 'proposed'):
        self.dtype, self.inner, self.scale, self.proposed = like.dtype, inner, scale, formulation == 'proposed'

    def forward(self, q: Tensor, k: Tensor, g: Tensor, h: Tensor, row_stats: Tensor, t: Tensor) -> None:
        """As `ProductBackend.forward`."""
        q, k = _row_major(q), _row_major(k)
        count = g.shape[2] // self.inner
        with torch.cuda.device_of(q):
            for n in range(count):
                self._launch(
                    apply, q_ptr=q, k_ptr=k, g_ptr=g, h_ptr=h, t_ptr=t, row_stats_ptr=row_stats, n=n,
                    ld_q=q.stride(1), ld_g=g.stride(1), ld_h=h.stride(1), ld_t=t.stride(0),
                    FIRST=n == 0, LAST=n == count - 1, PROPOSED=self.proposed)

    def backward(self, q: Tensor, k: Tensor, g: Tensor, h: Tensor, row_stats: Tensor, t: Tensor,
                 dh: Tensor, dq: Tensor, dk: Tensor, dg: Tensor) -> None:
        """As `ProductBackend.backward`.

        dQ is summed by atomic additions, in no fixed order, unless torch is told to be deterministic; then it takes a
        kernel of its own.
        """
        q, k = _row_major(q), _row_major(k)
        count = g.shape[2] // self.inner
        delta = torch.empty(row_stats.shape[:2], dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            for n in reversed(range(count)):
                self._launch(
                    apply_transposed, q_ptr=q, k_ptr=k, g_ptr=g, h_ptr=h, t_ptr=t, row_stats_ptr=row_stats, dg_ptr=dg,
                    dh_ptr=dh, delta_ptr=delta, n=n, k=count, ld_q=q.stride(1), ld_g=g.stride(1), ld_h=h.stride(1),
                    ld_t=t.stride(0), ld_dg=dg.stride(1), ld_dh=dh.stride(1),
                    FIRST=n == 0, LAST=n == count - 1, PROPOSED=self.proposed)
            closing = dict(q_ptr=q, k_ptr=k, g_ptr=g, dh_ptr=dh, row_stats_ptr=row_stats, delta_ptr=delta,
                           scale=self.scale, ld_q=q.stride(1), ld_g=g.stride(1), ld_dh=dh.stride(1),
                           K=count, HOLD=count * self.inner <= 192)
            if torch.are_deterministic_algorithms_enabled():
                self._launch(close_keys, dq_ptr=dq, dk_ptr=dk, ld_dk=dk.stride(1), ATOMIC=False, **closing)
                self._launch(close_queries, dq_ptr=dq, ld_dq=dq.stride(1), **closing)
            else:
                total = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
                self._launch(close_keys, dq_ptr=total, dk_ptr=dk, ld_dk=dk.stride(1), ATOMIC=True, **closing)
                torch.mul(total, self.scale, out=dq)

    def _launch(self, kernel: triton.JITFunction, **arguments: Any) -> None:
        q = arguments['q_ptr']
        images, positions, dim = q.shape
        widths = dim, self.inner
        blocks = tuple(max(16, triton.next_power_of_2(width)) for width in widths)
        tiles = TILES[kernel][64 if max(widths) <= 64 else 128]
        constants = tuple((name, value) for name, value in arguments.items() if name.isupper())
        case = kernel, q.device, q.dtype, widths, constants
        for index in range(_fitting.get(case, 0), len(tiles)):
            own, step, warps, stages = tiles[index]
            if images * triton.cdiv(positions, own) < 256:  # too few programs for a large GPU
                own //= 2
            own, step = (min(size, max(16, triton.next_power_of_2(positions))) for size in (own, step))
            try:
                kernel[triton.cdiv(positions, own), images](
                    **arguments, positions=positions, exponent=self.scale * LOG2_E, D=dim, C=self.inner,
                    BLOCK_D=blocks[0], BLOCK_C=blocks[1], OWN=own, STEP=step,
                    EVEN=positions % own == positions % step == 0 and blocks == widths,
                    num_warps=warps, num_stages=stages, enable_fp_fusion=FUSION)
                _fitting[case] = index
                return
            except triton.OutOfResources:
                if index == len(tiles) - 1:
                    raise


def _row_major(z: Tensor) -> Tensor:
    """z (b, M, D) with its columns side by side and no gap between images, copied if need be."""
    return z if z.stride(2) == 1 and z.stride(0) == z.shape[1] * z.stride(1) else z.contiguous()
