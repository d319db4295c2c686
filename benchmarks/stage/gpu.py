"""What only a GPU can tell: attention backends, tiles of the Triton kernels, the longest kernels of a step."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.stage.check import draw_operands
from benchmarks.stage.contenders import CHANNELS, Case, Step
from benchmarks.stage.measure import milliseconds

__all__ = ['attention', 'longest', 'tiles']

CANDIDATES = {  # rows owned, rows a step, warps, stages
    'apply': [(128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2), (128, 128, 8, 3),
              (64, 128, 4, 3), (128, 32, 4, 3), (256, 64, 8, 3)],
    'apply_transposed': [(128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2),
                         (64, 128, 4, 3), (128, 32, 4, 3), (256, 64, 8, 3)],
    'close_keys': [(128, 64, 8, 2), (128, 64, 8, 1), (64, 64, 4, 2), (64, 64, 4, 1), (128, 32, 8, 2), (64, 32, 4, 2),
                   (128, 128, 8, 1), (64, 128, 8, 1)],
    'close_queries': [(128, 64, 8, 2), (128, 64, 8, 1), (64, 64, 4, 2), (64, 64, 4, 1), (128, 128, 8, 1)],
}


def _median(function: Callable[[], Any], device: torch.device) -> float:
    for _ in range(3):
        function()
    return statistics.median(milliseconds(function, device, 10) for _ in range(7))


def attention(device: torch.device, images: int = 128, positions: int = 1024) -> Iterator[dict[str, Any]]:
    """One application of A with D = 32, 16 bits, by every backend: forward, forward + backward."""
    q, k, v = (torch.randn(images, 1, positions, CHANNELS // 2, device=device, dtype=torch.bfloat16, requires_grad=True)
               for _ in range(3))
    do = torch.randn_like(v)

    def both(attend: Callable[..., Tensor]) -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), do)

    ways: dict[str, Callable[..., Tensor]] = {}
    for backend in ('CUDNN_ATTENTION', 'FLASH_ATTENTION', 'EFFICIENT_ATTENTION', 'MATH'):
        def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = backend) -> Tensor:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v)
        ways[backend] = attend
    ways['FLEX'] = torch.compile(_flex, dynamic=False)
    for name, attend in ways.items():
        try:
            with torch.no_grad():
                forward = _median(partial(attend, q, k, v), device)
            yield {'backend': name, 'forward': forward, 'both': _median(partial(both, attend), device)}
        except Exception as error:  # a backend that does not take the case says so in its own way
            yield {'backend': name, 'failed': f'{type(error).__name__}: {error}'[:200]}


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention
    return flex_attention(q, k, v)


def tiles(device: torch.device, images: int = 128, positions: int = 1024) -> Iterator[dict[str, Any]]:
    """Milliseconds of the pass that a kernel belongs to with each of its tiles, the others as they are.

    Leaves the fastest in place, for what is measured next in this process.
    """
    from timm_nonlocal.ops import triton_backend
    kernels = {kernel.fn.__name__: kernel for kernel in triton_backend.TILES}
    for name, candidates in CANDIDATES.items():
        k = 5 if name.startswith('close') else 2
        projected, t, dh, scale = draw_operands(
            torch.bfloat16, device, images=images, positions=positions, dim=32, inner=32, k=k, logits=5.0)
        backend = triton_backend.TritonBackend(projected, positions, 32, scale)
        q, keys, g = projected.split((32, 32, 32 * k), dim=2)
        h = torch.empty(images, positions, 2 * 32 * k, device=device, dtype=torch.bfloat16)
        row_stats = torch.empty(images, positions, backend.stats_per_row, device=device)
        gradient = torch.empty_like(projected).split((32, 32, 32 * k), dim=2)
        run = partial(backend.forward, q, keys, g, h, row_stats, t)
        run()
        if name != 'apply':
            run = partial(backend.backward, q, keys, g, h, row_stats, t, dh, *gradient)
        torch.use_deterministic_algorithms(name == 'close_queries')
        own = triton_backend.TILES[kernels[name]]
        before, times = own[64], dict[tuple[int, int, int, int], float]()
        for tile in dict.fromkeys([before[0], *candidates]):
            own[64] = [tile]
            triton_backend._fitting.clear()
            try:
                times[tile] = _median(run, device)
                yield {'kernel': name, 'tile': tile, 'ms': times[tile], 'default': tile == before[0]}
            except Exception as error:
                yield {'kernel': name, 'tile': tile, 'failed': f'{type(error).__name__}: {error}'[:200]}
        own[64] = [min(times, key=times.__getitem__), *before[1:]] if times else before
        triton_backend._fitting.clear()
        torch.use_deterministic_algorithms(False)


def longest(case: Case, device: torch.device, steps: int = 10) -> list[dict[str, Any]]:
    """The kernels of our step that take most time, in microseconds a step."""
    step = Step('ours', case, device)
    step.both()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step.both()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals.setdefault(event.name, []).append(event.time_range.elapsed_us())
    ordered = sorted(totals.items(), key=lambda item: -sum(item[1]))[:15]
    return [{'name': name[:120], 'us': sum(times) / steps, 'count': len(times) / steps} for name, times in ordered]
