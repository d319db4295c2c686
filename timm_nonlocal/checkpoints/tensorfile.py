"""Files of tensors, of which only the tensors asked for are read: safetensors, in shards or behind a range reader.

A safetensors file is 8 bytes of little-endian header length, a JSON header that gives every tensor's dtype, shape and
place, and the tensors. Nothing in a header is believed before it is checked against the file.
"""

import json
import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .layouts import Shape

__all__ = ['CheckpointError', 'HubError', 'LocalFile', 'RangedFile', 'ShardedFile', 'TensorFile', 'UnsafePickleError',
           'header_length', 'is_pickle', 'named', 'parse_header', 'spans']

MAX_HEADER = 25_000_000  # bytes
GAP = 64 * 1024  # bytes between two tensors that are still read in one go
DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
    'F8_E4M3': torch.float8_e4m3fn, 'F8_E5M2': torch.float8_e5m2,
    'I64': torch.int64, 'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8, 'U8': torch.uint8,
    'BOOL': torch.bool,
}


class CheckpointError(Exception):
    """The target cannot be found or read; the message says what would work, `code` is the command's exit code."""

    code = 3


class UnsafePickleError(CheckpointError):
    """It is a pickle that would have to run code, or one that nobody allowed."""

    code = 5


class HubError(CheckpointError):
    """The Hub cannot be reached, or does not let us in."""

    code = 6


def named(path: Path) -> str | None:
    """What a file is that people take for weights and that holds none, in words; None where it is not one of these."""
    try:
        with open(path, 'rb') as file:
            start = file.read(512)
        names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    except (OSError, zipfile.BadZipFile):
        return None
    if start.startswith(b'version https://git-lfs'):
        return 'a Git LFS pointer in place of the file: `git lfs pull` gets that'
    if any(re.fullmatch(r'[^/]+/(?:code/.*|constants\.pkl)', name) for name in names):
        return 'a TorchScript archive, which is a program: save the state_dict() of the module that it was made from'
    if names and not any(name.endswith('data.pkl') for name in names):
        return 'a zip archive that torch.save did not write'
    if start.lstrip().startswith((b'<!', b'<html', b'<?xml')):
        return 'a page, perhaps of an error, that was saved under this name'
    return None if start else 'empty'


def is_pickle(path: Path) -> bool:
    """Whether a file that is no zip archive begins with a whole pickle, of which nothing is run."""
    try:
        with open(path, 'rb') as file:
            return all(True for _ in pickletools.genops(file))
    except Exception:  # whatever the arguments of its opcodes cannot be
        return False


class TensorFile(Protocol):
    """What all of them offer: the shapes at once, the tensors on demand."""

    shapes: dict[str, Shape]
    mode: str  # 'local', 'cache', 'download' or 'range'

    @property
    def bytes_read(self) -> int:
        """How many bytes have come so far."""

    @property
    def bytes_total(self) -> int | None:
        """The file's size; None where it is unknown."""

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors. Raises CheckpointError."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: begin and end are bytes from the file's start."""

    dtype: str
    shape: Shape
    begin: int
    end: int

    def tensor(self, data: bytes) -> Tensor:
        """The tensor from its bytes."""
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return flat.view(DTYPES[self.dtype]).reshape(self.shape)


def header_length(start: bytes, size: int | None) -> int:
    """The length of the JSON header from the file's first 8 bytes. Raises ValueError where it cannot be."""
    if len(start) < 8:
        raise ValueError(f'it ends after {len(start)} bytes')
    length = int.from_bytes(start[:8], 'little')
    if length > MAX_HEADER:
        raise ValueError(f'its header claims {length:,} bytes, above {MAX_HEADER:,}')
    if length < 2 or (size is not None and 8 + length > size):
        raise ValueError(f'its header claims {length:,} bytes of a file of {size:,}')
    return length


def parse_header(header: bytes, size: int | None) -> dict[str, Entry]:
    """The tensors that a safetensors header describes, those that are shared under every name.

    Args:
        header: the JSON, without the 8 bytes before it.
        size: of the whole file in bytes; None if unknown.

    Raises:
        ValueError: whatever a hostile or truncated file can hold in place of a header.
    """
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError('a name stands in its header twice')
        return dict(pairs)

    try:
        fields = json.loads(header.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError('its header is nested too deep') from None
    if not isinstance(fields, dict):
        raise ValueError('its header is not a JSON object')
    metadata = fields.pop('__metadata__', None)
    start, entries = 8 + len(header), {}
    for name, value in fields.items():
        try:
            dtype, shape, offsets = value['dtype'], value['shape'], value['data_offsets']
            whole = all(type(number) is int and number >= 0 for number in (*shape, *offsets))
            begin, end = offsets
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole or not isinstance(dtype, str) or not isinstance(shape, list):
            raise ValueError(f'its header does not describe {name[:80]!r}')
        if begin > end or (size is not None and start + end > size):
            raise ValueError(f'{name[:80]!r} is said to lie at bytes {begin} to {end} of a file of {size}')
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise ValueError(f'{name[:80]!r} is said to be {dtype} {str(shape)[:80]} in {end - begin} bytes')
        entries[name] = Entry(dtype, tuple(shape), start + begin, start + end)
    return entries | {alias: entries[kept] for alias, kept in _aliases(metadata, entries).items()}


def _aliases(metadata: Any, names: Iterable[str]) -> dict[str, str]:
    """Of a file's or an index's metadata the names of shared tensors that stand in it once: alias to kept name."""
    names = set(names)
    return {alias: kept for alias, kept in metadata.items()
            if isinstance(kept, str) and kept in names and alias not in names} if isinstance(metadata, dict) else {}


def spans(entries: Iterable[Entry]) -> list[tuple[int, int]]:
    """The byte ranges that cover the entries, those at most `GAP` apart in one."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((entry.begin, entry.end) for entry in entries):
        if merged and begin - merged[-1][1] <= GAP:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


class RangedFile:
    """A safetensors file behind a function that reads bytes of it.

    Args:
        name: of the file, for errors.
        fetch: bytes from `begin` to `end`, exclusive, of the file, or fewer where it ends.
        size: gives the file's size once the first bytes are there; None where it stays unknown.
        first: how many bytes to read at first, in the hope that the header is in them.

    Raises:
        CheckpointError: it is not a safetensors file.
    """

    mode = 'range'

    def __init__(self, name: str, fetch: Callable[[int, int], bytes], size: Callable[[], int | None],
                 first: int = 100_001):
        self.name, self.fetch, self.bytes_read = name, fetch, 0
        self.head = self._fetch(0, first)
        self.bytes_total = size()
        try:
            end = 8 + header_length(self.head, self.bytes_total)
            if end > len(self.head):
                self.head += self._fetch(len(self.head), end)
            if end > len(self.head):
                raise ValueError(f'it ends after {len(self.head)} bytes, inside its header')
            self.entries = parse_header(self.head[8:end], self.bytes_total)
        except ValueError as error:
            raise CheckpointError(f'{name} is not a readable safetensors file: {error}') from error
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}

    def _fetch(self, begin: int, end: int) -> bytes:
        data = self.fetch(begin, end)
        self.bytes_read += len(data)
        return data

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, in as few requests as their places allow. Raises CheckpointError."""
        wanted = {name: self.entries[name] for name in names}
        for name, entry in wanted.items():
            if entry.dtype not in DTYPES:
                raise CheckpointError(f'{self.name}: {name} has the dtype {entry.dtype[:40]}, not one of '
                                      f'{", ".join(DTYPES)}')
        tensors = {name: entry.tensor(self.head[entry.begin:entry.end]) for name, entry in wanted.items()
                   if entry.end <= len(self.head)}
        rest = {name: entry for name, entry in wanted.items() if name not in tensors}
        for begin, end in spans(rest.values()):
            data = self._fetch(begin, end)
            if len(data) != end - begin:
                raise CheckpointError(f'{self.name} gave {len(data)} of the {end - begin} bytes from {begin} on: '
                                      f'it is truncated, or changed while it was read')
            tensors |= {name: entry.tensor(data[entry.begin - begin:entry.end - begin])
                        for name, entry in rest.items() if begin <= entry.begin and entry.end <= end}
        return tensors


class LocalFile:
    """A safetensors file on disk. Raises CheckpointError if it is missing, truncated or something else."""

    def __init__(self, path: Path, mode: str = 'local'):
        self.path, self.mode = path, mode
        try:
            self.bytes_total = path.stat().st_size
            with safe_open(path, 'pt') as file:
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
                self.aliases = _aliases(file.metadata(), self.shapes)
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error
        self.shapes |= {alias: self.shapes[kept] for alias, kept in self.aliases.items()}
        self.bytes_read = 0 if mode != 'download' else self.bytes_total

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        try:
            with safe_open(self.path, 'pt') as file:
                tensors = {name: file.get_tensor(self.aliases.get(name, name)) for name in names}
        except (OSError, SafetensorError) as error:
            raise self._unreadable(error) from error
        if self.mode != 'download':
            self.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        return tensors

    def _unreadable(self, error: Exception) -> CheckpointError:
        what = named(self.path)
        return CheckpointError(f'{self.path} is not a readable safetensors file: {f"it is {what}" if what else error}')


class ShardedFile:
    """A checkpoint in several files, of which those with tensors that may be needed are opened, the others when read.

    Args:
        name: of the index, for errors.
        index: the text of `*.index.json`.
        needs: the names, of all there are, that may be needed.
        open_shard: opens the file of a given name beside the index.

    Raises:
        CheckpointError: the index is not one, or names a file elsewhere.
    """

    def __init__(self, name: str, index: str, needs: Callable[[list[str]], Iterable[str]],
                 open_shard: Callable[[str], TensorFile]):
        self.name = name
        try:
            fields = json.loads(index)
            self.weight_map = fields['weight_map']
            shards = set(self.weight_map.values())
            valid = all(re.fullmatch(r'[^/\\:\0]+\.(?:safetensors|bin)', shard) for shard in shards)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f'{name} is not an index of shards: {error!r}') from error
        if not valid:
            raise CheckpointError(f'{name} names a shard that does not lie beside it')
        self.aliases = _aliases(fields.get('metadata'), self.weight_map)
        self.weight_map |= {alias: self.weight_map[kept] for alias, kept in self.aliases.items()}
        needed = sorted({self.weight_map[key] for key in needs(list(self.weight_map)) if key in self.weight_map})
        self.open_shard, self.shards = open_shard, {shard: open_shard(shard) for shard in needed}
        self.shapes = {key: shape for shard in self.shards.values() for key, shape in shard.shapes.items()}
        self.shapes |= {alias: self.shapes[kept] for alias, kept in self.aliases.items() if kept in self.shapes}
        self.mode = next((shard.mode for shard in self.shards.values()), 'local')
        self.index_bytes = len(index.encode())

    @property
    def bytes_read(self) -> int:
        return self.index_bytes + sum(shard.bytes_read for shard in self.shards.values())

    @property
    def bytes_total(self) -> int | None:
        totals = [shard.bytes_total for shard in self.shards.values() if shard.bytes_total is not None]
        return sum(totals) if len(totals) == len(self.shards) else None

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        kept, tensors = {name: self.aliases.get(name, name) for name in names}, dict[str, Tensor]()
        for name in sorted({self.weight_map[name] for name in kept if name not in self.shapes} - self.shards.keys()):
            self.shards[name] = self.open_shard(name)
        for shard in self.shards.values():
            tensors |= shard.read([name for name in dict.fromkeys(kept.values()) if name in shard.shapes])
        if missing := next((name for name in kept.values() if name not in tensors), None):
            raise CheckpointError(f'{self.name}: {missing} is not in {self.weight_map[missing]}, where it should be')
        return {name: tensors[own] for name, own in kept.items()}
