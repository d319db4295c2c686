"""What files of strangers hold: it is measured, or named in one line, and the targets beside it are shown."""

import json
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf

from tests.support.one_line import Command, fails
from tests.support.range_server import COMMITS, serving
from timm_nonlocal import NonlocalBlocks, NonlocalStage, spectrum
from timm_nonlocal.analysis.spectra import Spectrum

ESCAPE = '\033]0;title\a\033[31m\u202e\n'


def block(g: tuple[int, ...] = (3, 6), **others: Any) -> dict[str, torch.Tensor]:
    """A block in SlowFast's naming, with what is said to stand beside it."""
    return {'b.conv_g.weight': torch.randn(*g), 'b.conv_out.weight': torch.randn(6, 3),
            **{f'b.{name.replace("__", ".")}': tensor for name, tensor in others.items()}}


def stages(out: str) -> list[dict[str, Any]]:
    return [stage for target in json.loads(out)['targets'] for stage in target['stages']]


# eq. (1) or eq. (8), where no θ tells

def gaussian(name: str = 'preresnet20_nl_proposed_k2', **nl_args: Any) -> tuple[Any, dict[str, Any]]:
    nl_args = {'affinity': 'gaussian', **nl_args}
    return timm.create_model(name, nl_args=nl_args), {'nl_args': nl_args}


@pytest.mark.parametrize(('name', 'expected'), [
    ('preresnet20_nl_proposed_k2', 'proposed'), ('preresnet20_nl_original_k2', 'original')])
def test_a_config_tells_the_formulation(inspect: Command, tmp_path: Path, name: str, expected: str) -> None:
    model, args = gaussian(name)
    save_for_hf(model, str(tmp_path / 'run'), safe_serialization=True, model_args=args)
    for target in (tmp_path / 'run', tmp_path / 'run' / 'model.safetensors'):
        code, out, err = inspect(target, '--stability', '--json')
        (stage,) = stages(out)
        assert (code, err, stage['formulation'], stage['stability']['mu_basis']) == (0, '', expected, 'bound')
        assert all(found['symmetric'] and found['stability']['kappa'] >= 1 for found in stage['blocks'])
    bare = tmp_path / 'bare.safetensors'
    (tmp_path / 'run' / 'model.safetensors').rename(bare)
    code, out, err = inspect(bare, '--stability', '--json')
    assert (code, stages(out)[0]['formulation']) == (0, 'unknown') and 'name the network with --arch' in err
    assert stages(inspect(bare, '--arch', name, '--json')[1])[0]['formulation'] == expected


@pytest.mark.parametrize(('config', 'expected'), [
    ({'architecture': 'preresnet20', 'model_args': {'nl': 'original', 'nl_args': {}}}, 'original'),
    ({'architecture': 'resnet50_nl_proposed_k5', 'model_args': {'nl_args': {'kind': 'original'}}}, 'original'),
    ({'architecture': 'my_original', 'model_args': {'nl': 'original'}}, 'unknown'),
    ({'architecture': ['preresnet20'], 'model_args': 3}, 'unknown'), (3, 'unknown'),
    ({'architecture': 'preresnet20', 'model_args': {'nl': {}, 'nl_args': []}}, 'unknown'),
])
def test_arguments_of_the_network_come_before_its_name(inspect: Command, tmp_path: Path, config: object,
                                                       expected: str) -> None:
    save_file(NonlocalStage(8, k=2, affinity='gaussian').state_dict(), tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert stages(inspect(tmp_path, '--json')[1])[0]['formulation'] == expected


def test_a_config_on_the_hub_is_read_where_the_weights_do_not_tell(inspect: Command, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    model, args = gaussian()
    save_for_hf(model, str(tmp_path / 'run'), safe_serialization=True, model_args=args)
    files = {name: tmp_path / 'run' / name for name in ('model.safetensors', 'config.json')}
    with serving(files={COMMITS[0]: files}) as hub:
        monkeypatch.setenv('HF_ENDPOINT', hub.address)
        target = json.loads(inspect('user/repo', '--no-token', '--json')[1])['targets'][0]
        assert (target['stages'][0]['formulation'], target['sha256']) == ('proposed', 'a' * 64)
        del files['config.json']
        assert stages(inspect('user/repo', '--no-token', '--json')[1])[0]['formulation'] == 'unknown'


@pytest.mark.parametrize(('module', 'expected'), [(NonlocalStage, 'proposed'), (NonlocalBlocks, 'original')])
@pytest.mark.parametrize('affinity', ['gaussian', 'uniform'])
def test_a_module_tells_the_formulation(module: type[NonlocalBlocks] | type[NonlocalStage], expected: str,
                                        affinity: str) -> None:
    block = module(8, k=2, affinity=affinity)
    other = {'proposed': NonlocalBlocks, 'original': NonlocalStage}[expected](8, k=1, affinity=affinity)
    for net in (block, torch.nn.ModuleDict({'n': other, 'nl': torch.nn.DataParallel(block)})):
        assert [(record.formulation, record.symmetric) for record in spectrum(net)][-2:] == [(expected, True)] * 2


# tensors

@pytest.mark.parametrize('norm', [
    {'norm__weight': torch.ones(5), 'norm__running_var': torch.ones(5)},
    {'norm__weight': torch.ones(1), 'norm__running_var': torch.ones(1)},
    {'norm__weight': torch.ones(6), 'norm__running_var': torch.ones(6, 6)},
    {'norm__weight': torch.ones(6, 1), 'norm__running_var': torch.ones(6)},
])
def test_a_norm_of_odd_shape_is_not_folded_and_that_is_said(inspect: Command, weights: tuple[Path, list[Spectrum]],
                                                            tmp_path: Path, norm: dict[str, Any]) -> None:
    tensors = block(**{name: 2 * tensor for name, tensor in norm.items()})
    save_file(tensors, tmp_path / 'odd.safetensors')
    code, out, err = inspect(tmp_path / 'odd.safetensors', weights[0], '--json')
    odd, *good = stages(out)
    assert code == 0 and len(good) == 1 and 'not 6 numbers each: not folded' in err and len(err.splitlines()) == 1
    trace = (tensors['b.conv_out.weight'] @ tensors['b.conv_g.weight']).double().trace().item()
    assert not odd['blocks'][0]['folded'] and odd['blocks'][0]['trace'] == pytest.approx(trace, rel=1e-5)


def test_sparse_tensors_are_their_values(inspect: Command, tmp_path: Path) -> None:
    tensors = block()
    torch.save(tensors, tmp_path / 'dense.pth')
    expected = stages(inspect(tmp_path / 'dense.pth', '--json')[1])
    for layout in ('to_sparse', 'to_sparse_csr'):
        torch.save({name: getattr(tensor, layout)() for name, tensor in tensors.items()}, tmp_path / 'sparse.pth')
        assert stages(inspect(tmp_path / 'sparse.pth', '--json')[1]) == expected


def test_every_target_is_read_by_itself(inspect: Command, weights: tuple[Path, list[Spectrum]], tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({name: tensor.to('meta') for name, tensor in block().items()}, tmp_path / 'meta.pth')
    save_file({'cell.gweight': torch.ones(3, 6), 'cell.zweight': torch.ones(6, 3)}, tmp_path / 'cell.safetensors')
    save_file({'b.g.weight_orig': torch.randn(3, 6), 'b.g.weight_u': torch.randn(4), 'b.g.weight_v': torch.randn(6),
               'b.z.weight': torch.randn(6, 3), 'b.theta.weight': torch.randn(3, 6)}, tmp_path / 'u.safetensors')
    code, out, err = inspect(tmp_path / 'meta.pth', tmp_path / 'cell.safetensors', tmp_path / 'u.safetensors',
                             weights[0], '--json')
    assert code == 4 and len(stages(out)) == 1
    meta, cell, vector = (line for line in err.splitlines() if line.startswith('error'))
    assert 'meta.pth: b.conv_g.weight is on the meta device' in meta
    assert 'cell.safetensors has no nonlocal block' in cell and 'u.safetensors has no nonlocal block' in vector
    nothing: dict[str, None] = {}
    monkeypatch.setattr('timm_nonlocal.inspect.command.measure', lambda *_: nothing['what nobody\nthought of'])
    fails(inspect, 3, "model.safetensors: KeyError: 'what nobody\\nthought of'", weights[0])


# images

@pytest.mark.parametrize('channels', [1, 4])
def test_pictures_for_networks_of_other_channels(inspect: Command, tmp_path: Path, channels: int) -> None:
    model = timm.create_model('preresnet20_nl_proposed_k1', in_chans=channels)
    save_for_hf(model, str(tmp_path / 'run'), model_args={'in_chans': channels}, safe_serialization=True)
    (tmp_path / 'pictures').mkdir()
    Image.new('RGB', (40, 40), (200, 30, 90)).save(tmp_path / 'pictures' / 'one.png')
    arguments = (tmp_path / 'run', '--images', tmp_path / 'pictures', '-q')
    if channels == 4:
        fails(inspect, 3, 'run: the network takes images of 4 channels, and pictures have 1 (grey) or 3', *arguments)
    else:
        code, out, err = inspect(*arguments)
        assert (code, err) == (0, '') and 'predictions on 1 images' in out


# files

def torchscript(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(3, 4)).save(str(path))


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('notes.txt', 'x')


POINTER = f'version https://git-lfs.github.com/spec/v1\noid sha256:{"a" * 64}\nsize 12345\n'.encode()
FILES: dict[str, Any] = {
    'a Git LFS pointer in place of the file: `git lfs pull`': POINTER, 'a TorchScript archive': torchscript,
    'a zip archive that torch.save did not write': archive, 'a page, perhaps of an error': b'\n<!DOCTYPE html><html>',
    'empty': b'', 'no pickle, or one cut short': bytes(range(256)) * 4, 'no pickle,': b'hello, this is text',
    'no pickle, or': b'\x80\x02}q\x00X\x03',
}


@pytest.mark.parametrize('what', FILES)
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_file_of_something_else_is_named(inspect: Command, tmp_path: Path, what: str, suffix: str) -> None:
    path = tmp_path / f'file{suffix}'
    FILES[what](path) if callable(FILES[what]) else path.write_bytes(FILES[what])
    fails(inspect, 3, 'is not a readable safetensors file' if suffix == '.safetensors' and 'pickle' in what else what,
          path)


# names

def test_escapes_in_names_do_not_reach_the_terminal(inspect: Command, tmp_path: Path) -> None:
    path = tmp_path / f'{ESCAPE}.safetensors'
    tensors = {f'{ESCAPE}nl.{name}.weight': torch.randn(*shape) for name, shape in (
        ('theta', (3, 6)), ('g', (3, 6)), ('z', (6, 3)))}
    odd = {f'{ESCAPE}b.g.conv.weight': torch.randn(3, 6), f'{ESCAPE}b.conv_out.conv.weight': torch.randn(5, 3)}
    save_file(tensors | odd, path)
    near = {f'{ESCAPE}x.{name}.weight': torch.randn(*shape) for name, shape in (('v', (3, 6)), ('o', (6, 3)))}
    save_file(near, tmp_path / 'near.safetensors')
    for arguments in (('--list',), ('--stability', '--check', 'neg_top<0'), ('--format', 'csv'),
                      ('--format', 'markdown'), ('--json', '--verbose')):
        code, out, err = inspect(path, tmp_path / 'near.safetensors', *arguments)
        assert code == 4 and not set('\033\a\u202e\r') & set(out + err), arguments
        assert all(len(line) < 3 or not line.startswith('nl') for line in (out + err).splitlines())
        assert r'\x1b[31m\u202e' in err and (r'\x1b[31m\u202e\n' in out or r'\u001b[31m\u202e\n' in out)
    assert stages(out)[0]['name'] == f'{ESCAPE}nl'


@pytest.mark.parametrize('flag', ['--check=neg_top<=4', '--json', '--stability', '--output=x', '--plot=x.png',
                                  '--images=x'])
def test_a_list_reads_no_weights_and_says_what_it_cannot_do(inspect: Command, weights: tuple[Path, list[Spectrum]],
                                                            flag: str) -> None:
    code, out, err = inspect(weights[0], '--list', flag)
    assert (code, out) == (2, '') and '--list names the blocks and reads no weights: leave' in err


def test_a_key_map_that_matches_nothing_is_said(inspect: Command, weights: tuple[Path, list[Spectrum]],
                                                tmp_path: Path) -> None:
    other = tmp_path / 'other.safetensors'
    save_file({'att.value.weight': torch.randn(2, 4), 'att.out.weight': torch.randn(4, 2)}, other)
    wrong, right = r'g=\.valeu\.weight,z=out\.weight', r'g=value\.weight,z=out\.weight'
    fails(inspect, 4, '--key-map matches 0 names for g, 1 names for z of its 2 tensors', other, '--key-map', wrong)
    code, out, err = inspect(weights[0], '--key-map', wrong, '-q')
    assert code == 4 and 'layer1.nl' in out and err == f'error: --key-map {wrong} matches no block of any target\n'
    code, out, err = inspect(weights[0], other, '--key-map', right, '-q')
    assert (code, err) == (0, '') and 'layer1.nl' in out and 'att.' in out
