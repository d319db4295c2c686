"""What a step of the stage has to do at least, and how long the machine needs for that."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.stage.contenders import CHANNELS, Case
from benchmarks.stage.measure import milliseconds
from timm_nonlocal import NonlocalStage

__all__ = ['ceilings', 'counts', 'floor']


def counts(case: Case) -> dict[str, float]:
    """Of forward + backward with A made from Q and K whenever it is used, which is what keeps it out of memory.

    A is used k times forward, k times backward and once in the closing pass: each time M² exponentials and one product
    of width D, where the operator, which torch's counter knows, makes it twice. What moves at least: X and dZ read, Zᵏ
    and dX written, once each.
    """
    pairs, uses = case.images * case.side ** 4, 2 * case.k + 1
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x, dz = case.inputs(torch.device('cpu'))
        NonlocalStage(CHANNELS, case.k, dtype=x.dtype)(x).backward(dz)
    itemsize = getattr(torch, case.dtype).itemsize
    return {'flop': counter.get_total_flops() + 2.0 * pairs * (CHANNELS // 2) * (uses - 2),
            'exponentials': float(uses * pairs),
            'bytes': 4.0 * case.images * case.side ** 2 * CHANNELS * itemsize}


def ceilings(device: torch.device) -> dict[str, Any]:
    """Rates seen on the machine: copies (read and written) in B/s, matrix products in FLOP/s by dtype, exponentials
    per second (on a GPU by count: 16 a clock and multiprocessor)."""
    gpu = device.type == 'cuda'

    def fastest(function: Callable[[], object], count: int) -> float:
        function()
        return min(milliseconds(function, device) for _ in range(count)) / 1000

    x, y = (torch.empty(2 ** 31 if gpu else 2 ** 26, dtype=torch.uint8, device=device).random_() for _ in range(2))
    found: dict[str, Any] = {'copy': 2 * x.nbytes / fastest(lambda: y.copy_(x), 10), 'product': {}}
    for dtype in (torch.bfloat16, torch.float32):
        size = 8192 if gpu else 1024
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found['product'][str(dtype).removeprefix('torch.')] = 2 * size ** 3 / fastest(partial(torch.matmul, a, b), 10)
    if gpu:
        properties = torch.cuda.get_device_properties(device)
        clock = getattr(properties, 'clock_rate', 1_755_000) * 1000  # kHz
        found['exponential'] = 16.0 * properties.multi_processor_count * clock
    else:
        a, b = torch.randn(2 ** 18), torch.empty(2 ** 18)
        found['exponential'] = a.numel() / fastest(lambda: torch.exp(a, out=b), 50)
    return found


def floor(case: Case, ceilings: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by each ceiling; the longest is the roofline."""
    need = counts(case)
    return {'flop': 1000 * need['flop'] / ceilings['product'][case.dtype],
            'exponentials': 1000 * need['exponentials'] / ceilings['exponential'],
            'bytes': 1000 * need['bytes'] / ceilings['copy']}
