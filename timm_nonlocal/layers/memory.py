"""Whether the affinity between M positions, an M×M matrix for each image, fits into memory: asked before it is made."""

from pathlib import Path

import psutil
import torch
from torch import Tensor

__all__ = ['check_memory']

ASKED_FROM = 1 << 30  # bytes: a smaller matrix is made without asking
CGROUPS, OWN_GROUPS = Path('/sys/fs/cgroup'), Path('/proc/self/cgroup')  # Linux's, and which of them are this process's
LIMITS = {  # by version: where a group's limit stands, what it uses, and what of that are files that can be dropped
    2: ('memory.max', 'memory.current', 'inactive_file'),
    1: ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file'),
}


def available(device: torch.device) -> float:
    """Bytes that can still be allocated on a device, infinite where nobody knows."""
    if device.type == 'cpu':
        return min(psutil.virtual_memory().available, left_in_container())
    if device.type == 'cuda' and not torch.cuda.is_current_stream_capturing():
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return float('inf')


def left_in_container() -> float:
    """Bytes that the limits on this process's group, and on those around it, leave; infinite where there are none."""
    left = float('inf')
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.is_file() else ():
        _, controllers, path = line.split(':', 2)
        if not controllers or 'memory' in controllers.split(','):
            root, names = (CGROUPS / 'memory', LIMITS[1]) if controllers else (CGROUPS, LIMITS[2])
            own = Path(path.lstrip('/'))  # a container may see its own group as the root, and know it by another path
            left = min(left, *(_left(root / group, *names) for group in (own, *own.parents)))
    return left


def _left(group: Path, limit: str, usage: str, dropped: str) -> float:
    try:
        most, used = (int((group / name).read_text()) for name in (limit, usage))
        stat = dict(line.split() for line in (group / 'memory.stat').read_text().splitlines())
    except (OSError, ValueError):  # no such file, or 'max'
        return float('inf')
    return max(0, most - used + int(stat.get(dropped, 0)))


def check_memory(q: Tensor) -> Tensor:
    """Features of the positions, (B, M, D), as they came.

    Raises:
        torch.OutOfMemoryError: K and A, B M² numbers each, do not fit into what memory is left. Nobody is asked by a
            graph that holds tensor operators alone: TorchScript's, scripted or traced, that of `torch.compile`, of
            `torch.export` and of ONNX. One of `torch.fx` asks.
    """
    if not torch.jit.is_scripting():
        _ask(q)
    return q


@torch.jit.ignore
def _ask(q: Tensor) -> None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    images, positions = q.shape[0] * _at_once(q), q.shape[1]
    need = 2 * images * positions ** 2 * q.element_size()
    if need > ASKED_FROM and need > (free := available(q.device)):
        raise torch.OutOfMemoryError(
            f'the affinity between {positions} positions takes {need / 2 ** 30:.1f} GiB for a batch of {images}, and '
            f'{free / 2 ** 30:.1f} GiB are free: out of memory. Use fewer or smaller images, or merged=True with '
            f"affinity 'embedded_gaussian', 'gaussian', 'dot_product' or 'positive_dot_product', none of which then "
            f'makes the matrix, as long as all layers are bias-free nn.Linear without hooks and no transform of '
            f'torch.func is active')


def _at_once(q: Tensor) -> int:
    """How many such tensors `torch.vmap` hides behind q."""
    inside = q
    while torch._C._functorch.is_functorch_wrapped_tensor(inside):
        inside = torch._C._functorch.get_unwrapped(inside)
    return inside.numel() // q.numel() if q.numel() else 1
