"""Reading from the Hub over loopback: what is read, how much of it, and every way in which the server can fail."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.support.range_server import COMMITS, RangeServer, pad, serving
from tests.support.shards import in_shards
from timm_nonlocal.analysis.spectra import Spectrum, measure, spectrum
from timm_nonlocal.checkpoints.layouts import find
from timm_nonlocal.checkpoints.targets import CheckpointError, Options, Source, open_target
from timm_nonlocal.checkpoints.tensorfile import HubError, UnsafePickleError

NAME = 'model.safetensors'


@pytest.fixture
def hub_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The Hub client as it is outside these tests, with a cache of its own."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('HF_TOKEN', 'hf_of_these_tests')


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, dict[str, Path]]:
    """Four blocks in a file of about 100 MB, as trained in two different runs."""
    folders = {}
    for commit in COMMITS:
        torch.manual_seed(COMMITS.index(commit))
        folder = tmp_path / commit[:4]
        folder.mkdir()
        model = timm.create_model('preresnet20_nl_original_k4')
        save_file(model.state_dict(), folder / NAME)
        pad(folder / NAME, 100_000_000)
        folders[commit] = {NAME: folder / NAME}
    return folders


@pytest.fixture
def hub(hub_env: None, weights: dict[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    with serving(files=weights) as server:
        monkeypatch.setenv('HF_ENDPOINT', server.address)
        yield server


def spectra_of(source: Source) -> list[Spectrum]:
    blocks = find(source.tensors.shapes).blocks
    return [measure(block, source.tensors.read(block.names)) for block in blocks]


def read(target: str = 'user/repo', **options: Any) -> tuple[Source, list[Spectrum]]:
    """The source, with the tensors of all its blocks read at once as the command does, and their spectra."""
    source = open_target(target, Options(**options))
    blocks = find(source.tensors.shapes).blocks
    tensors = source.tensors.read([name for block in blocks for name in block.names])
    return source, [measure(block, tensors) for block in blocks]


def test_two_requests_and_under_200_kb_of_100_mb(hub: RangeServer, weights: dict[str, dict[str, Path]]) -> None:
    source, records = read()
    assert [record.index for record in records] == [0, 1, 2, 3]
    assert records == spectra_of(open_target(str(weights[COMMITS[0]][NAME])))  # the same bits as a local read
    assert len(hub.requests) == 2 and hub.sent < 200_000
    tensors = source.tensors
    assert (tensors.mode, tensors.bytes_read) == ('range', hub.sent)
    assert tensors.bytes_total == weights[COMMITS[0]][NAME].stat().st_size > 99_000_000
    assert source.repo and (source.repo.commit, source.repo.sha256) == (COMMITS[0], 'a' * 64)
    assert f'range: {hub.sent / 1e3:.0f} kB of 100 MB' in source.label and 'user/repo @ aaaaaaaa' in source.label
    assert [request.authorization for request in hub.requests] == ['Bearer hf_of_these_tests'] * 2


def test_later_requests_are_of_the_first_ones_commit(hub: RangeServer, weights: dict[str, dict[str, Path]]) -> None:
    hub.move_after = 1  # main moves between the header and the tensors
    source, records = read()
    assert f'/resolve/{COMMITS[0]}/' in hub.requests[1].path
    assert source.repo and source.repo.commit == COMMITS[0]
    assert records == spectra_of(open_target(str(weights[COMMITS[0]][NAME])))


def test_a_server_that_changes_commit_half_way_is_noticed(hub: RangeServer) -> None:
    hub.move_after, hub.forget_commits = 1, True
    with pytest.raises(CheckpointError, match='went from commit aaaaaaaa to bbbbbbbb while it was read'):
        read()


def test_redirect_to_a_storage_elsewhere(hub: RangeServer, weights: dict[str, dict[str, Path]]) -> None:
    with serving(files=weights) as storage:
        hub.redirect = storage
        source, records = read()
        assert records == spectra_of(open_target(str(weights[COMMITS[0]][NAME])))
        assert source.repo and (source.repo.commit, source.repo.sha256) == (COMMITS[0], 'a' * 64)
        assert [request.status for request in hub.requests + storage.requests] == [302, 302, 206, 206]
        assert storage.sent < 200_000 and all(request.range for request in storage.requests)


def test_a_storage_that_changes_half_way_is_noticed(hub: RangeServer, weights: dict[str, dict[str, Path]],
                                                    tmp_path: Path) -> None:
    other = {commit: {NAME: tmp_path / f'{commit[:4]}.other'} for commit in weights}
    for commit in weights:
        other[commit][NAME].write_bytes(weights[commit][NAME].read_bytes()[:50_000_000])
    with serving(files=weights) as storage:
        hub.redirect = storage
        source = open_target('user/repo')
        storage.files = other
        with pytest.raises(CheckpointError, match='changed while it was read'):
            source.tensors.read([name for block in find(source.tensors.shapes).blocks for name in block.names])


def test_a_server_that_ignores_ranges(hub: RangeServer, weights: dict[str, dict[str, Path]],
                                      capsys: pytest.CaptureFixture[str]) -> None:
    hub.ignore_range = True
    for commit in weights:  # small enough to be sent whole
        save_file(timm.create_model('preresnet20_nl_proposed_k1').state_dict(), weights[commit][NAME])
    with pytest.raises(HubError, match='ignores ranges; read it whole with --remote download'):
        read(remote='range')
    source, records = read()
    assert source.tensors.mode == 'download' and 'is downloaded whole' in capsys.readouterr().err
    assert records == spectra_of(open_target(str(weights[COMMITS[0]][NAME])))
    count = len(hub.requests)
    assert read()[0].tensors.mode == 'cache' and len(hub.requests) == count
    source, again = read(offline=True)
    assert source.repo and (source.tensors.mode, source.repo.commit, again) == ('cache', COMMITS[0], records)


def test_whole_download_when_asked(hub: RangeServer, weights: dict[str, dict[str, Path]]) -> None:
    for commit in weights:
        save_file(timm.create_model('preresnet20_nl_proposed_k1').state_dict(), weights[commit][NAME])
    source, _ = read(remote='download')
    assert source.tensors.mode == 'download'
    assert source.tensors.bytes_read == source.tensors.bytes_total == weights[COMMITS[0]][NAME].stat().st_size


def test_revision_and_addresses_of_a_repository(hub: RangeServer, weights: dict[str, dict[str, Path]]) -> None:
    expected = spectra_of(open_target(str(weights[COMMITS[1]][NAME])))
    for target in (f'user/repo@{COMMITS[1]}', f'hf-hub:user/repo@{COMMITS[1]}', f'hf://user/repo@{COMMITS[1]}'):
        assert read(target)[1] == expected
    assert read('hf_hub:user/repo', revision=COMMITS[1], file=NAME)[1] == expected
    with pytest.raises(CheckpointError, match='user/repo has no revision v9'):
        read('user/repo@v9')


@pytest.mark.parametrize(('target', 'ref'), [
    ('user/repo@refs/pr/1', 'refs/pr/1'), ('user/repo@refs%2Fpr%2F1', 'refs/pr/1'), ('user/repo@a/b/c', 'a/b/c'),
    ('hf-hub:user/repo@feature/x', 'feature/x'), ('hf://user/repo@refs/convert/parquet', 'refs/convert/parquet'),
    ('https://huggingface.co/user/repo/tree/refs%2Fpr%2F1', 'refs/pr/1'),
    ('https://huggingface.co/user/repo/blob/refs/pr/12/model.safetensors', 'refs/pr/12'),
    ('https://huggingface.co/user/repo/tree/feature%2Fx/', 'feature/x'),
])
def test_revisions_with_a_slash(hub: RangeServer, weights: dict[str, dict[str, Path]], target: str, ref: str) -> None:
    hub.refs = {ref: COMMITS[1]}
    source, records = read(target)
    assert source.repo and (source.repo.revision, source.repo.commit) == (ref, COMMITS[1])
    assert records == spectra_of(open_target(str(weights[COMMITS[1]][NAME])))


@pytest.mark.parametrize(('refuse', 'kind', 'message'), [
    ((403, 'GatedRepo'), HubError, 'is gated'),
    ((401, 'RepoNotFound'), CheckpointError, 'no such repository, or a private one'),
    ((404, 'RepoNotFound'), CheckpointError, 'no such repository, or a private one'),
    ((429, ''), HubError, 'the Hub refuses'),
    ((500, ''), HubError, 'the Hub refuses'),
])
def test_the_hub_refuses(hub: RangeServer, refuse: tuple[int, str], kind: type[Exception], message: str) -> None:
    hub.refuse = refuse
    with pytest.raises(CheckpointError, match=message) as caught:
        read()
    assert type(caught.value) is kind and '\n' not in str(caught.value)


def test_a_repository_without_weights(hub: RangeServer) -> None:
    hub.files = {commit: {} for commit in hub.files}
    with pytest.raises(CheckpointError, match='has no model.safetensors or model.safetensors.index.json or pytorch'):
        read()


def test_nobody_answers(hub_env: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(HubError, match='cannot be reached'):
        read()
    with pytest.raises(HubError, match='not in the cache, and this is offline'):
        read(offline=True)
    with pytest.raises(CheckpointError, match='is not the name of a repository'):
        read('hf-hub:a/b/c')


@pytest.mark.parametrize(('fault', 'message'), [
    ({'cut': 1}, 'came|cannot be reached'), ({'shift': 1}, 'the server offers'), ({'shift': -1}, 'the server offers'),
])
def test_answers_that_do_not_fit_the_request(hub: RangeServer, fault: dict[str, int], message: str) -> None:
    source = open_target('user/repo')
    for name, value in fault.items():
        setattr(hub, name, value)
    with pytest.raises(CheckpointError, match=message):
        source.tensors.read([find(source.tensors.shapes).blocks[-1].w_g])


@pytest.mark.parametrize('content', [b'', b'\x02', b'\xff' * 8 + b'{}', (10).to_bytes(8, 'little') + b'{"a"'])
def test_remote_files_that_are_no_safetensors(hub: RangeServer, tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'bad').write_bytes(content)
    hub.files = {COMMITS[0]: {NAME: tmp_path / 'bad'}}
    with pytest.raises(CheckpointError, match='not a readable safetensors file|empty or truncated'):
        read()


def test_shards_are_opened_only_where_a_block_is(hub: RangeServer, tmp_path: Path) -> None:
    model = timm.create_model('preresnet20_nl_proposed_k2')
    state = model.state_dict()
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        shards.setdefault('1.safetensors' if '.nl.' in name else '2.safetensors', {})[name] = tensor
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name)
    index = {'weight_map': {name: shard for shard, tensors in shards.items() for name in tensors}}
    (tmp_path / 'index').write_text(json.dumps(index))
    hub.files = {COMMITS[0]: {'model.safetensors.index.json': tmp_path / 'index',
                              **{name: tmp_path / name for name in shards}}}
    source, records = read()
    assert records == spectrum(model)
    assert not any(request.path.endswith('2.safetensors') for request in hub.requests)
    assert source.tensors.bytes_read == hub.sent


@pytest.mark.parametrize('target', ['user/repo', 'https://huggingface.co/user/repo/blob/main/sub/fol/{}',
                                    'https://huggingface.co/user/repo/tree/main/sub/fol'])
@pytest.mark.parametrize('index', ['model.safetensors.index.json', 'pytorch_model.bin.index.json'])
def test_shards_beside_an_index_in_a_subfolder(hub: RangeServer, tmp_path: Path, index: str, target: str) -> None:
    model = timm.create_model('preresnet20_nl_proposed_k2')
    hub.files = {COMMITS[0]: {f'sub/fol/{path.name}': path for path in in_shards(model.state_dict(), tmp_path, index)}}
    source, records = read(target.format(index), file=None if ':' in target else f'sub/fol/{index}', allow_pickle=True)
    assert records == spectrum(model) and source.format == ('pickle' if '.bin.' in index else 'safetensors')
    assert source.state_dict().keys() == model.state_dict().keys()


def test_pickled_shards_are_found_and_fetched_only_when_allowed(hub: RangeServer, tmp_path: Path) -> None:
    model = timm.create_model('preresnet20_nl_proposed_k2')
    files = {path.name: path for path in in_shards(model.state_dict(), tmp_path, 'pytorch_model.bin.index.json')}
    hub.files = {COMMITS[0]: files}
    with pytest.raises(UnsafePickleError, match='--allow-pickle'):
        read()
    assert read(allow_pickle=True)[1] == spectrum(model)


def test_a_branch_with_a_slash_is_found_in_the_cache(hub: RangeServer, weights: dict[str, dict[str, Path]]) -> None:
    for commit in weights:
        save_file(timm.create_model('preresnet20_nl_proposed_k1').state_dict(), weights[commit][NAME])
    hub.refs = {'refs/pr/1': COMMITS[1]}
    _, records = read('user/repo@refs/pr/1', remote='download')
    source, again = read('user/repo@refs/pr/1', offline=True)
    assert source.repo and (source.tensors.mode, source.repo.commit, again) == ('cache', COMMITS[1], records)


def test_a_shard_that_is_missing(hub: RangeServer, tmp_path: Path) -> None:
    state = timm.create_model('preresnet20_nl_proposed_k2').state_dict()
    files = {path.name: path for path in in_shards(state, tmp_path, 'model.safetensors.index.json')}
    del files['1.safetensors']
    hub.files = {COMMITS[0]: files}
    with pytest.raises(CheckpointError, match='user/repo has no 1.safetensors beside model.safetensors.index.json'):
        read()


def test_a_pickle_is_fetched_only_when_allowed(hub: RangeServer, tmp_path: Path) -> None:
    model = timm.create_model('preresnet20_nl_proposed_k1')
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'pickle')
    hub.files = {COMMITS[0]: {'pytorch_model.bin': tmp_path / 'pickle'}}
    with pytest.raises(UnsafePickleError, match='--allow-pickle'):
        read()
    assert hub.sent < 100
    source, records = read(allow_pickle=True)
    assert source.format == 'pickle' and records == spectrum(model)


def test_progress_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    from timm_nonlocal.checkpoints.remote import Progress
    progress = Progress('user/repo/model.safetensors', 3_000_000, after=-1)
    progress.last -= 1
    progress.advance(1_000_000)
    assert capsys.readouterr().err == ''
    monkeypatch.setattr('sys.stderr.isatty', lambda: True, raising=False)
    progress.advance(500_000)
    progress.close()
    assert 'model.safetensors: 1.5 of 3.0 MB' in capsys.readouterr().err


def test_a_pickle_behind_a_server_without_ranges(hub, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    torch.save(timm.create_model('preresnet20_nl_proposed_k1').state_dict(), tmp_path / 'pickle')
    hub.files, hub.ignore_range = {COMMITS[0]: {'pytorch_model.bin': tmp_path / 'pickle'}}, True
    with pytest.raises(UnsafePickleError, match='--allow-pickle'):
        read()
