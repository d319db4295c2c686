"""How runs are computed: what is set before the first step, and changes no result beyond rounding."""

import contextlib
import ctypes
import os
from dataclasses import dataclass

import torch

__all__ = ['Execution']

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Execution:
    """How runs are computed. None of it changes a result beyond rounding.

    Attributes:
        graph: on a GPU, in one process: capture the step in a CUDA graph.
        deterministic: on a GPU: the same bits every time, at some cost.
        sync_bn: batch statistics over all processes that share a run.
    """

    graph: bool = True
    deterministic: bool = False
    sync_bn: bool = False

    def prepare(self, device: torch.device) -> None:
        """Sets what libraries must know before they are first used."""
        if device.type == 'cpu':
            keep_freed_memory()
        if device.type != 'cuda':
            return
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # the same bits also with several streams
        torch.backends.cudnn.benchmark = not self.deterministic
        torch.backends.cudnn.deterministic = self.deterministic
        torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all is written first


def keep_freed_memory() -> None:
    """Has glibc keep what tensors free for the next ones: fresh pages cost a step on the CPU up to a third of its time.

    Other C libraries are left as they are. Constants of mallopt(3).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, -1)
