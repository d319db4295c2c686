"""Time, memory and captured graphs of a function; needs torch alone."""

import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ['captured', 'extra_bytes', 'milliseconds']


def milliseconds(function: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """One measurement: the mean of some calls in a row, by device events or on the CPU by the wall clock."""
    if device.type == 'cuda':
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            function()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / repeats
    since = time.perf_counter()
    for _ in range(repeats):
        function()
    return 1000 * (time.perf_counter() - since) / repeats


def extra_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The peak of what a call allocates, without what was there before and what it returns."""
    function()
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        results = function()
        returned = torch.cuda.memory_allocated(device) - before
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            results = function()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
        total = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            total += event.nbytes()
            peak = max(peak, total)
        returned = total
    del results
    return peak - returned


def captured(function: Callable[[], Any]) -> Callable[[], None] | None:
    """Replays a CUDA graph of the function; None where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = function()
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay(results: Any = results) -> None:  # which live as long as the graph that writes them
        graph.replay()

    return replay
