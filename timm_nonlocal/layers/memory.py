"""Whether the affinity between M positions, an M×M matrix for each image, fits into memory: asked before it is made."""

import psutil
import torch
from torch import Tensor

__all__ = ['with_room']

ASKED_FROM = 1 << 30  # bytes: a smaller matrix is made without asking


def available(device: torch.device) -> float:
    """Bytes that can still be allocated on a device, infinite where nobody knows."""
    if device.type == 'cpu':
        return psutil.virtual_memory().available
    if device.type == 'cuda' and not torch.cuda.is_current_stream_capturing():
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return float('inf')


def with_room(q: Tensor) -> Tensor:
    """Features of the positions, (B, M, D), as they came.

    Raises:
        torch.OutOfMemoryError: K and A, B M² numbers each, do not fit into what memory is left. Nobody is asked while
            a graph is made, by whatever means.
    """
    if not torch.jit.is_scripting():
        _ask(q)
    return q


@torch.jit.ignore
def _ask(q: Tensor) -> None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    images, positions = q.shape[:2]
    need = 2 * images * positions ** 2 * q.element_size()
    if need > ASKED_FROM and need > (free := available(q.device)):
        raise torch.OutOfMemoryError(
            f'the affinity between {positions} positions takes {need / 2 ** 30:.1f} GiB for a batch of {images}, and '
            f'{free / 2 ** 30:.1f} GiB are free: out of memory. Use fewer or smaller images, or merged=True with '
            f"affinity 'embedded_gaussian', 'gaussian', 'dot_product' or 'positive_dot_product', none of which then "
            f'makes the matrix')
