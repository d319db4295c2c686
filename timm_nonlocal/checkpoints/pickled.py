"""Pickled checkpoints: which of the dicts in one is the state dict. Nothing is built but tensors and plain values.

Of several the one is taken that has a nonlocal block, then averaged weights before others, then by the names in GROUPS.
"""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import last_line
from .layouts import Shape, find
from .tensorfile import CheckpointError, UnsafePickleError, is_pickle, named

__all__ = ['InMemory', 'load_pickle']

GROUPS = ('state_dict', 'model', 'model_state', 'model_state_dict', 'net', 'network', 'params', 'generator')
_AVERAGED = re.compile(r'(?:^|_)ema(?:_|$)', re.IGNORECASE)
_OTHER = re.compile(r'(?:^|_)optim|sched|scaler', re.IGNORECASE)  # tensors of something else
DEPTH = 4  # of dicts in dicts


class Inert:
    """Stands for a numpy object, which is not built: no value but tensors is used."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


_NUMPY = [(type(name, (Inert,), {}), f'{module}.{name}') for module, name in (
    ('numpy', 'dtype'), ('numpy', 'ndarray'), *(
        (f'numpy.{core}.multiarray', name) for core in ('core', '_core') for name in ('scalar', '_reconstruct')))]


class InMemory:
    """A state dict that is there already; `notes` say in words why it is this one."""

    def __init__(self, state_dict: dict[str, Tensor], mode: str = 'local', size: int | None = None,
                 notes: Iterable[str] = ()) -> None:
        self.state_dict, self.mode, self.bytes_total, self.notes = state_dict, mode, size, [*notes]
        self.bytes_read = size or 0
        self.shapes: dict[str, Shape] = _shapes(state_dict)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.state_dict[name] for name in names}


def _shapes(state_dict: dict[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def load_pickle(path: Path, mode: str = 'local') -> InMemory:
    """The state dict in a pickled checkpoint, of which nothing but tensors and plain values is ever loaded.

    Raises:
        UnsafePickleError: it asks for anything else to be built or called; nothing of that is done.
        CheckpointError: it is not a checkpoint.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_NUMPY]), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about old protocols
            content = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch has no error of its own for a file that is no checkpoint
        what = named(path) or (None if zipfile.is_zipfile(path) or is_pickle(path) else 'no pickle, or one cut short')
        if what or not isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(f'{path} is neither a safetensors file nor a readable pickle of tensors ' + (
                f'but {what}' if what else f'({type(error).__name__}: {last_line(error)[:200]})')) from error
        asks = re.search(r'GLOBAL ([\w.]+)|(Unsupported \w+ \d+)', str(error))
        reason = f'it asks for {asks[1]}' if asks and asks[1] else asks[2] if asks else last_line(error)[:200]
        raise UnsafePickleError(
            f'{path} is refused: it is no pickle of tensors and plain values alone ({reason}), and nothing else is '
            f'loaded; save its state dict as safetensors where you trust it') from error
    groups = {'.'.join(way): tensors for way, tensors in _groups(content, (), set())}
    if not groups:
        raise CheckpointError(f'{path} holds no state dict')
    most = max(map(len, groups.values()))

    def rank(group: str) -> tuple[bool, ...]:
        names = group.split('.')
        return (bool(find(_shapes(groups[group])).blocks), 2 * len(groups[group]) > most,
                any(map(_AVERAGED.search, names)), *(known in names for known in GROUPS))

    best = max(groups, key=rank)  # the first of equals
    serious = [group or 'the top' for group, tensors in groups.items() if 2 * len(tensors) > most or group == best]
    note = f'{path.name}: read {best or "the top"}, of {", ".join(serious)}, which all hold tensors'
    return InMemory(groups[best], mode, path.stat().st_size, [note] if len(serious) > 1 else [])


def _groups(content: Any, way: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """The dicts with tensors inside a checkpoint, by the way to them."""
    if not isinstance(content, dict) or id(content) in seen or len(way) > DEPTH:
        return
    seen.add(id(content))
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield way, tensors
    for key, value in content.items():
        if isinstance(key, str) and not _OTHER.search(key):
            yield from _groups(value, (*way, key), seen)
