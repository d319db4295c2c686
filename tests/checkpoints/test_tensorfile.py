"""The reader of safetensors headers on good, damaged and hostile files, with safetensors itself as the judge."""

import itertools
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors import deserialize as judge
from safetensors.torch import save

from timm_nonlocal.checkpoints.tensorfile import (
    DTYPES,
    GAP,
    MAX_HEADER,
    CheckpointError,
    Entry,
    LocalFile,
    RangedFile,
    ShardedFile,
    spans,
)

TENSORS = {
    'a.g.weight': torch.randn(4, 8), 'a.z.weight': torch.randn(8, 4, 1, 1).half(), 'scalar': torch.tensor(3.5),
    'empty': torch.empty(0, 3), 'b': torch.randn(3).bfloat16(), 'counts': torch.arange(5),
    'flags': torch.tensor([True]), 'e4m3': torch.randn(2, 2).to(torch.float8_e4m3fn), 'double': torch.randn(2).double(),
}
GOOD = save(TENSORS, {'format': 'pt'})


def ranged(data: bytes, first: int = 64) -> RangedFile:
    return RangedFile('file', lambda begin, end: data[begin:end], lambda: len(data), first)


def attempt(data: bytes) -> bool:
    """Reads a file of any bytes, all of it that can be read. Only CheckpointError may come out; True where it was read.

    What safetensors accepts must be accepted, with the same shapes, and no tensor may lie outside of the file.
    """
    try:
        file = ranged(data)
    except CheckpointError as error:
        assert '\n' not in str(error)
        try:
            judged = dict(judge(data))
        except (SafetensorError, ValueError, OverflowError):
            return False
        if any(tensor['dtype'] not in DTYPES for tensor in judged.values()) or 'twice' in str(error):
            return False
        raise AssertionError(f'safetensors reads it, we do not: {error}') from error
    for name, entry in file.entries.items():
        assert 8 <= entry.begin <= entry.end <= len(data)
        if entry.dtype in DTYPES:
            assert tuple(file.read([name])[name].shape) == entry.shape == file.shapes[name]
        else:
            with pytest.raises(CheckpointError):
                file.read([name])
    return True


@pytest.mark.parametrize('first', [8, 64, 100_001])
def test_reads_what_safetensors_wrote(first: int) -> None:
    file = ranged(GOOD, first)
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, tensor in file.read(TENSORS).items():
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor.float(), TENSORS[name].float()), name
    assert file.bytes_read <= 2 * len(GOOD)


def header(fields: object, body: bytes = b'', length: int | None = None) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text + body


def one(**changes: object) -> bytes:
    """A file with one tensor of four bytes, described with changes."""
    return header({'x': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4], **changes}}, b'\0' * 4)


HOSTILE = {
    'empty': (b'', 'it ends after 0 bytes'),
    'seven bytes': (b'\0' * 7, 'it ends after 7 bytes'),
    'no header': (struct.pack('<Q', 0), 'claims 0 bytes'),
    'header beyond the file': (header({}, length=3_000), 'claims 3,000 bytes of a file of 10'),
    'header of an exabyte': (header({}, length=2 ** 60), f'above {MAX_HEADER:,}'),
    'largest length': (header({}, length=2 ** 64 - 1), f'above {MAX_HEADER:,}'),
    'no JSON': (header(b'{"x": '), 'not a readable safetensors file'),
    'no UTF-8': (header(b'{"\xff": 1}'), 'not a readable safetensors file'),
    'a list': (header([1, 2]), 'not a JSON object'),
    'nested': (header(b'[' * 100_000), 'nested too deep|not a readable'),
    'nested in an entry': (header(b'{"x":' + b'{"x":' * 100_000), 'nested too deep|not a readable'),
    'huge number': (header(b'{"x": ' + b'9' * 10_000 + b'}'), 'not a readable safetensors file'),
    'entry is a number': (header({'x': 5}), "does not describe 'x'"),
    'entry is a list': (header({'x': ['dtype']}), "does not describe 'x'"),
    'no dtype': (header({'x': {'shape': [], 'data_offsets': [0, 0]}}), "does not describe 'x'"),
    'dtype is a list': (one(dtype=['F32']), "does not describe 'x'"),
    'shape is text': (one(shape='1'), "does not describe 'x'"),
    'shape is negative': (one(shape=[-1]), "does not describe 'x'"),
    'shape is a fraction': (one(shape=[1.0]), "does not describe 'x'"),
    'shape is true': (one(shape=[True]), "does not describe 'x'"),
    'shape overflows': (one(shape=[2 ** 62, 2 ** 62]), 'is said to be F32'),
    'three offsets': (one(data_offsets=[0, 4, 4]), "does not describe 'x'"),
    'offsets of text': (one(data_offsets='04'), "does not describe 'x'"),
    'offsets reversed': (one(data_offsets=[4, 0]), 'is said to lie'),
    'offsets negative': (one(data_offsets=[-4, 0]), "does not describe 'x'"),
    'offsets beyond the file': (one(data_offsets=[4, 8]), 'is said to lie'),
    'wrong dtype': (one(dtype='F64'), r'is said to be F64 \[1\] in 4 bytes'),
    'wrong shape': (one(shape=[3]), r'is said to be F32 \[3\] in 4 bytes'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    with pytest.raises(CheckpointError, match=message):
        ranged(data)
    attempt(data)
    (tmp_path / 'file.safetensors').write_bytes(data)
    with pytest.raises(CheckpointError, match='is not a readable safetensors file'):
        LocalFile(tmp_path / 'file.safetensors')


def test_a_name_that_stands_twice_is_refused() -> None:
    """safetensors takes one of the two; which one is not ours to guess."""
    entry = b'"x":{"dtype":"U8","shape":[],"data_offsets":[0,1]}'
    with pytest.raises(CheckpointError, match='stands in its header twice'):
        ranged(header(b'{' + entry + b',' + entry + b'}', b'\0'))


def test_a_dtype_that_is_new_stops_only_who_reads_it() -> None:
    file = ranged(header({'x': {'dtype': 'F2', 'shape': [16], 'data_offsets': [0, 4]},
                          'y': {'dtype': 'U8', 'shape': [2], 'data_offsets': [4, 6]}}, b'\0\0\0\0\1\2'))
    assert file.read(['y'])['y'].tolist() == [1, 2]
    with pytest.raises(CheckpointError, match='x has the dtype F2'):
        file.read(['x'])


def test_a_file_that_ends_before_its_tensors() -> None:
    data = bytearray(GOOD)
    file = RangedFile('file', lambda begin, end: bytes(data[begin:end]), lambda: len(GOOD), 64)
    del data[-40:]
    with pytest.raises(CheckpointError, match='is truncated, or changed while it was read'):
        file.read(TENSORS)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    attempt(data)
    attempt(struct.pack('<Q', max(len(data) - 8, 0)) + data[8:])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)
entries = st.fixed_dictionaries({
    'dtype': st.sampled_from([*DTYPES, 'F2', '']) | json_values,
    'shape': st.lists(st.integers(-1, 9), max_size=3) | json_values,
    'data_offsets': st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(['a', 'b', '__metadata__']), entries | json_values, max_size=3),
       st.binary(max_size=40))
def test_any_header(fields: dict[str, Any], body: bytes) -> None:
    attempt(header(fields, body))


def test_damaged_files() -> None:
    """Bytes of a good file changed, dropped and doubled, from a fixed seed; some remain readable, none goes wrong."""
    generator, read = random.Random(0), 0
    for _ in range(2_000):
        data = bytearray(GOOD)
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(data))
            choice = generator.random()
            if choice < 0.6:
                data[place] = generator.randrange(256)
            elif choice < 0.8:
                del data[place:place + generator.randint(1, 9)]
            else:
                data[place:place] = data[place:place + generator.randint(1, 9)]
        read += attempt(bytes(data))
    assert 100 < read < 1_900


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 10 ** 6), st.integers(0, 10 ** 5)), max_size=12))
def test_spans_cover_and_are_apart(places: list[tuple[int, int]]) -> None:
    merged = spans(Entry('U8', (length,), begin, begin + length) for begin, length in places)
    assert all(any(start <= begin and begin + length <= end for start, end in merged) for begin, length in places)
    assert all(later[0] - earlier[1] > GAP for earlier, later in itertools.pairwise(merged))


def test_shards(tmp_path: Path) -> None:
    (tmp_path / '1.safetensors').write_bytes(save({'a': torch.ones(2), 'b': torch.zeros(3)}))
    (tmp_path / '2.safetensors').write_bytes(save({'c': torch.full((4,), 2.0)}))
    weight_map = {'a': '1.safetensors', 'b': '1.safetensors', 'c': '2.safetensors', 'd': 'missing.safetensors'}
    opened = []

    def open_shard(name: str) -> LocalFile:
        opened.append(name)
        return LocalFile(tmp_path / name)

    file = ShardedFile('index', json.dumps({'weight_map': weight_map}), lambda names: {'a', 'c'}, open_shard)
    assert opened == ['1.safetensors', '2.safetensors'] and set(file.shapes) == {'a', 'b', 'c'}
    assert {name: tensor.tolist() for name, tensor in file.read(['c', 'a']).items()} == {'a': [1, 1], 'c': [2] * 4}
    none = ShardedFile('index', json.dumps({'weight_map': weight_map}), lambda names: [], open_shard)
    assert (none.shapes, none.bytes_total) == ({}, 0)


@pytest.mark.parametrize('index', ['', '[]', '{}', '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '[' * 100_000,
                                   *(json.dumps({'weight_map': {'a': name}}) for name in (
                                       '../x.safetensors', '/etc/x.safetensors', 'a/b', 'C:x', '..\\x', '', '..'))])
def test_indexes_that_are_none_or_point_elsewhere(index: str) -> None:
    with pytest.raises(CheckpointError, match='is not an index of shards|does not lie beside it'):
        ShardedFile('index', index, lambda names: names, pytest.fail)


if __name__ == '__main__':  # pip install atheris; python -m tests.checkpoints.test_tensorfile -max_total_time=180
    import sys
    import tempfile
    from pathlib import Path

    import atheris

    from timm_nonlocal.checkpoints import tensorfile

    for part in (tensorfile.header_length, tensorfile.parse_header, tensorfile.RangedFile.__init__):
        atheris.instrument_func(part)
    with tempfile.TemporaryDirectory() as seeds:
        for number, seed in enumerate([GOOD, one(), *(data for data, _ in HOSTILE.values() if len(data) < 4096)]):
            Path(seeds, str(number)).write_bytes(seed)
        atheris.Setup([*sys.argv, '-max_len=4096', seeds], attempt)
        atheris.Fuzz()
