"""Every kind of target, what is read of it, and pickles that want more than tensors."""

import argparse
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file, save_model
from timm.models import save_for_hf

from tests.support.shards import in_shards
from timm_nonlocal import spectrum
from timm_nonlocal.analysis.spectra import Spectrum
from timm_nonlocal.checkpoints.layouts import find
from timm_nonlocal.checkpoints.targets import CheckpointError, Options, Source, load_pickle, near_names, open_target
from timm_nonlocal.checkpoints.tensorfile import HubError, RangedFile, ShardedFile, UnsafePickleError
from timm_nonlocal.inspect import command

NAME = 'preresnet20_nl_proposed_k2'


@pytest.fixture
def model() -> Any:
    return timm.create_model(NAME)


def records(source: Source) -> list[Spectrum]:
    names = [name for block in find(source.tensors.shapes).blocks for name in block.names]
    return spectrum(source.tensors.read(names))


def same_numbers(source: Source, model: torch.nn.Module) -> bool:
    """The keys of the blocks alone say the same as the whole model (θ included)."""
    found, expected = records(source), spectrum(model)
    return [record.eigenvalues for record in found] == [record.eigenvalues for record in expected] != []


def test_folder_of_a_run(model: Any, tmp_path: Path) -> None:
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    for target in (str(tmp_path), f'local-dir:{tmp_path}'):
        source = open_target(target)
        assert same_numbers(source, model)
        assert (source.kind, source.architecture, source.trained, source.repo) == ('dir', NAME, True, None)
        assert source.file == str(tmp_path / 'model.safetensors')
    size = (tmp_path / 'model.safetensors').stat().st_size
    assert source.tensors.bytes_read < size == source.tensors.bytes_total


@pytest.mark.parametrize('config', ['', '[]', '{"architecture": 3}', '{"architecture": "os.system"}', None])
def test_nothing_in_a_config_is_believed(model: Any, tmp_path: Path, config: str | None) -> None:
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    if config is not None:
        (tmp_path / 'config.json').write_text(config)
    assert open_target(str(tmp_path)).architecture is None


def test_file_and_shards(model: Any, tmp_path: Path) -> None:
    state = model.state_dict()
    save_file(state, tmp_path / 'whatever.st')
    source = open_target(str(tmp_path / 'whatever.st'))
    assert (source.kind, source.format) == ('file', 'safetensors') and same_numbers(source, model)

    names = sorted(state)
    for number in range(3):
        save_file({name: state[name] for name in names[number::3]}, tmp_path / f'{number}.safetensors')
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(
        {'weight_map': {name: f'{position % 3}.safetensors' for position, name in enumerate(names)}}))
    assert same_numbers(open_target(str(tmp_path / 'model.safetensors.index.json')), model)
    source = open_target(str(tmp_path))
    assert source.kind == 'dir' and same_numbers(source, model)
    needed = {position % 3 for position, name in enumerate(names) if '.g.' in name or '.z.' in name}
    assert isinstance(source.tensors, ShardedFile)
    assert set(source.tensors.shards) == {f'{number}.safetensors' for number in needed}


@pytest.mark.parametrize('index', ['model.safetensors.index.json', 'pytorch_model.bin.index.json'])
def test_shards_in_a_subfolder_and_of_pickles(model: Any, tmp_path: Path, index: str) -> None:
    folder = tmp_path / 'sub' / 'folder'
    in_shards(model.state_dict(), folder, index)
    for source in (open_target(str(tmp_path), Options(file=f'sub/folder/{index}')), open_target(str(folder)),
                   open_target(str(folder / index))):
        assert same_numbers(source, model) and source.format == ('pickle' if '.bin.' in index else 'safetensors')
        assert {block.formulation for block in find(source.tensors.shapes).blocks} == {'proposed'}
        state = source.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def shared(model: Any) -> Any:
    first, *others = model.layer1.nl.sub_blocks
    for block in others:
        block.g = first.g
    return model


def test_shared_tensors_under_every_name(tmp_path: Path) -> None:
    model = shared(timm.create_model('preresnet20_nl_proposed_k3'))
    save_model(model, str(tmp_path / 'model.safetensors'))
    data = (tmp_path / 'model.safetensors').read_bytes()
    remote = RangedFile('file', lambda begin, end: data[begin:end], lambda: len(data))
    kept = load_file(tmp_path / 'model.safetensors')
    aliases = {name: next(other for other, tensor in kept.items() if torch.equal(tensor, value))
               for name, value in model.state_dict().items() if name not in kept}
    assert len(aliases) == 2
    in_shards(kept, tmp_path / 'shards', 'model.safetensors.index.json')
    index = json.loads((tmp_path / 'shards' / 'model.safetensors.index.json').read_text())
    index['metadata'] |= aliases  # as huggingface_hub's save_torch_state_dict notes them
    (tmp_path / 'shards' / 'model.safetensors.index.json').write_text(json.dumps(index))
    for source in (open_target(str(tmp_path)), open_target(str(tmp_path / 'shards')), Source('', 'file', '', remote)):
        assert same_numbers(source, model) and len(records(source)) == 3
        model.load_state_dict(source.state_dict())


def test_an_alias_of_what_is_not_there_is_none(model: Any, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in model.state_dict().items() if name != 'layer1.nl.sub_blocks.0.g.weight'}
    save_file(state, tmp_path / 'model.safetensors', {'layer1.nl.sub_blocks.0.g.weight': 'gone', 'format': 'pt'})
    found = find(open_target(str(tmp_path)).tensors.shapes)
    assert [block.index for block in found.blocks] == [1]
    assert found.warnings[0].startswith('layer1.nl.sub_blocks.0.z.weight has no W_g beside it')


def test_which_file_of_a_folder(model: Any, tmp_path: Path) -> None:
    save_file(model.state_dict(), tmp_path / 'other.safetensors')
    with pytest.raises(CheckpointError, match=r'holds no model.safetensors; name one of its files with --file: other'):
        open_target(str(tmp_path))
    assert same_numbers(open_target(str(tmp_path), Options(file='other.safetensors')), model)


def test_registered_name_without_weights_is_always_the_same_draw() -> None:
    name = 'preresnet20_nl_proposed_k1'  # which no table of the paper has, so that nobody trains it
    first, second = open_target(name), open_target(f'{name}.cifar100')
    assert (first.kind, first.trained, first.architecture) == ('model', False, name)
    assert records(first) == records(second) == records(open_target(name))


def test_registered_name_with_a_file(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(model.state_dict(), tmp_path / 'shipped.safetensors')
    cfg = timm.models.get_pretrained_cfg(f'{NAME}.cifar10')
    assert cfg
    monkeypatch.setattr('timm_nonlocal.checkpoints.targets.get_pretrained_cfg', lambda *_, **__: type(cfg)(
        **{**cfg.to_dict(), 'file': str(tmp_path / 'shipped.safetensors')}))
    source = open_target(f'{NAME}.cifar10')
    assert source.trained and source.file == str(tmp_path / 'shipped.safetensors') and same_numbers(source, model)


def test_registered_name_with_the_weights_of_its_backbone() -> None:
    source = open_target('resnet50_nl_proposed_k5')
    assert (source.kind, source.trained) == ('model', False) and len(find(source.tensors.shapes).blocks) == 5


def test_registered_name_with_weights_on_the_hub() -> None:
    with pytest.raises(HubError, match=r'timm/resnet18\.\w+ is not in the cache'):
        open_target('resnet18')


def test_file_in_the_hubs_cache(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    snapshot = tmp_path / 'models--some--net' / 'snapshots' / ('c' * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / 'models--some--net' / 'refs').mkdir()
    (tmp_path / 'models--some--net' / 'refs' / 'main').write_text('c' * 40)
    save_file(model.state_dict(), snapshot / 'model.safetensors')
    for target in ('some/net', 'hf-hub:some/net', f'some/net@{"c" * 40}', 'https://huggingface.co/some/net',
                   'https://huggingface.co/some/net/blob/main/model.safetensors'):
        source = open_target(target)
        assert source.repo and (source.kind, source.tensors.mode, source.repo.commit) == ('hub', 'cache', 'c' * 40)
        assert same_numbers(source, model)


@pytest.mark.parametrize(('target', 'message'), [
    ('preresnet20_nl_proposed_k0', 'no such file, folder or registered name. Did you mean preresnet20_nl_proposed_k'),
    ('preresnet20.nothing', 'Invalid pretrained tag'), ('a/b/c', 'no such file or folder'),
    ('gone/model.safetensors', 'no such file or folder'), ('gone.pth', 'no such file or folder'),
    ('local-dir:gone', 'no such file or folder'), ('local-dir:gone/folder', 'no such file or folder'),
])
def test_targets_that_are_not_there(target: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_target(target)
    assert type(caught.value) is CheckpointError and '\n' not in str(caught.value)


def test_near_names() -> None:
    assert near_names('preresnet20_nl_original_k9').startswith(' Did you mean preresnet20_nl_original_k')
    assert near_names('nothing like it') == ''


@pytest.mark.parametrize('group', ['state_dict', 'state_dict_ema', 'model', 'model_ema', 'model_state', None])
@pytest.mark.parametrize('zipped', [True, False])
def test_training_checkpoints(model: Any, tmp_path: Path, group: str | None, zipped: bool) -> None:
    """As timm and others write them: groups, a Namespace of arguments, prefixes of wrappers."""
    state = {f'module._orig_mod.{name}': tensor for name, tensor in model.state_dict().items()}
    content = {group: state, 'epoch': 3, 'args': argparse.Namespace(lr=0.1)} if group else state
    path = tmp_path / 'checkpoint-3.pth.tar'
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    source = open_target(str(path))
    assert source.format == 'pickle' and same_numbers(source, model)
    assert [block.stage for block in find(source.tensors.shapes).blocks] == ['layer1.nl'] * 2


def test_averaged_weights_come_first(model: Any, tmp_path: Path) -> None:
    other = timm.create_model(NAME)
    torch.save({'state_dict': other.state_dict(), 'state_dict_ema': model.state_dict()}, tmp_path / 'last.pth')
    assert same_numbers(open_target(str(tmp_path / 'last.pth')), model)


CONTAINERS = {  # what holds the weights `w`, beside others `o`, and the way to what is read
    'model_state_dict': (lambda w, o: {'model_state_dict': w, 'optimizer': {'state': {0: {'m': o['fc.bias']}}}}, None),
    'net': (lambda w, o: {'net': w, 'acc': 93.1, 'epoch': 3}, None),
    'params_ema': (lambda w, o: {'params': o, 'params_ema': w}, 'params_ema'),
    'params': (lambda w, o: {'params': w}, None),
    'generator': (lambda w, o: {'discriminator': o, 'generator': w}, 'generator'),
    'generator alone has blocks': (lambda w, o: {'a': {'fc.bias': torch.ones(2)}, 'disc': plain(o), 'gen': w}, 'gen'),
    'nested': (lambda w, o: {'model': {'state_dict': w, 'args': {'depth': 20}}}, None),
    'EMA in a module': (lambda w, o: {'model_ema': {'module': w}, 'model': o}, 'model_ema.module'),
    'an average': (lambda w, o: {'ema': w, **o}, 'ema'),
    'a config beside': (lambda w, o: {**w, 'config': {'mean': torch.ones(3), 'name': 'net'}, 'model': {'depth': 20}},
                        None),
    'a config first': (lambda w, o: {'model': {'mean': torch.ones(3)}, 'net': w}, None),
    'an optimizer by names': (lambda w, o: {'optimizer': {name: {'exp_avg': tensor} for name, tensor in o.items()} | o,
                                            'network': w}, None),
    'itself': (lambda w, o: itself({'weights': w}), None),
    'once': (lambda w, o: {'state_dict': w, 'model': w}, None),
}


def plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if '.nl.' not in name}


def itself(content: dict[str, Any]) -> dict[str, Any]:
    content['self'] = {'again': content}
    return content


@pytest.mark.parametrize('name', CONTAINERS)
def test_the_dict_that_holds_tensors(model: Any, tmp_path: Path, name: str) -> None:
    make, way = CONTAINERS[name]
    torch.save(make(model.state_dict(), timm.create_model(NAME).state_dict()), tmp_path / 'last.ckpt')
    source = open_target(str(tmp_path / 'last.ckpt'))
    assert same_numbers(source, model) and source.state_dict().keys() >= model.state_dict().keys()
    assert [note.partition(', of ')[0] for note in source.notes] == ([f'last.ckpt: read {way}'] if way else [])


def test_which_was_read_is_in_the_report(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = model.state_dict()
    torch.save({'state_dict': state, 'state_dict_ema': {**state}}, tmp_path / 'last.pth')
    assert command.main([str(tmp_path / 'last.pth'), '--json']) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)['targets'][0]['warnings'] == [
        'last.pth: read state_dict_ema, of state_dict, state_dict_ema, which all hold tensors']
    assert err.startswith('note: last.pth: read state_dict_ema')


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('core', ['_core', 'core'])
def test_numpy_in_a_checkpoint(model: Any, tmp_path: Path, zipped: bool, core: str) -> None:
    content = {'state_dict': model.state_dict(), 'best': np.float64(93.1), 'epochs': np.int64(3), 'seen': np.arange(3),
               'ok': np.bool_(True), 'text': np.array(['a', 'b']), 'list': [np.float32(1)] * 2}
    torch.save(content, tmp_path / 'last.pth', _use_new_zipfile_serialization=zipped)
    data = (tmp_path / 'last.pth').read_bytes()
    if core == 'core' and not zipped:  # as numpy 1 writes it
        (tmp_path / 'last.pth').write_bytes(data.replace(b'numpy._core.', b'numpy.core.'))
    assert same_numbers(open_target(str(tmp_path / 'last.pth')), model)


def test_no_function_of_numpy_is_called(tmp_path: Path) -> None:
    for call in (np.load, np.fromfile, np.memmap):
        torch.save({'a.weight': torch.ones(2), 'extra': Hostile(call, tmp_path / 'mark')}, tmp_path / 'file.pth')
        with pytest.raises(UnsafePickleError, match='it asks for numpy'):
            load_pickle(tmp_path / 'file.pth')


class Hostile:
    """Unpickled by whoever trusts it, makes a file."""

    def __init__(self, call: Callable[..., object], path: str | Path) -> None:
        self.made = call, (str(path),)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return self.made


@pytest.mark.parametrize('call', [os.mkdir, eval])
@pytest.mark.parametrize('form', ['zip', 'legacy', *range(pickle.HIGHEST_PROTOCOL + 1)])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path: Path, call: Callable[..., object],
                                                      form: int | str) -> None:
    mark = tmp_path / 'ran'
    argument = f'__import__("os").mkdir({str(mark)!r})' if call is eval else mark
    content = {'state_dict': {'a.g.weight': torch.ones(1, 2)}, 'extra': Hostile(call, argument)}
    path = tmp_path / 'hostile.pth'
    if isinstance(form, int):
        path.write_bytes(pickle.dumps(Hostile(call, argument), protocol=form))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 'zip')
    with pytest.raises(UnsafePickleError, match='is refused') as caught:
        open_target(str(path))
    assert not mark.exists() and caught.value.code == 5 and '\n' not in str(caught.value)
    if not isinstance(form, int):  # a load that trusts it does run it
        torch.load(path, weights_only=False)
        assert mark.exists()


def test_a_whole_module_is_refused(model: Any, tmp_path: Path) -> None:
    torch.save(model, tmp_path / 'model.pt')
    with pytest.raises(UnsafePickleError, match=r'it asks for timm_nonlocal\.models\.preresnet\.PreResNet'):
        load_pickle(tmp_path / 'model.pt')


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', b'just some text', b'\x80\x02', b'\0' * 100])
def test_files_of_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'file.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match='nor a readable pickle of tensors|is refused') as caught:
        open_target(str(tmp_path / 'file.pth'))
    assert '\n' not in str(caught.value)


def test_truncated_pickles(model: Any, tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save(model.state_dict(), tmp_path / 'whole.pth', _use_new_zipfile_serialization=zipped)
        data = (tmp_path / 'whole.pth').read_bytes()
        for length in (10, 100, len(data) // 2, len(data) - 1):
            (tmp_path / 'cut.pth').write_bytes(data[:length])
            with pytest.raises(CheckpointError):
                load_pickle(tmp_path / 'cut.pth')


@pytest.mark.parametrize('content', [[1, 2], {'epoch': 3}, 5, torch.ones(2), {'state_dict': {'a': 1}}])
def test_pickles_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / 'file.pth')
    with pytest.raises(CheckpointError, match='holds no state dict'):
        load_pickle(tmp_path / 'file.pth')
