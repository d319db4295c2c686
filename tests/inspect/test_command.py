"""The inspect command: what it prints, every exit code, and one clear line for each thing that can be wrong."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from tests.support.one_line import Command, fails
from tests.support.process import ROOT, run
from tests.support.range_server import COMMITS, serving
from timm_nonlocal import NonlocalBlocks
from timm_nonlocal.analysis.spectra import Spectrum
from timm_nonlocal.inspect.command import main

GOLDEN = Path(__file__).with_name('golden') / 'inspect.json'


# what it prints

def test_as_a_user_runs_it(weights: tuple[Path, list[Spectrum]]) -> None:
    result = run('-m', 'timm_nonlocal.inspect', str(weights[0]), '-q')
    assert (result.returncode, result.stderr) == (0, '')
    assert result.stdout.startswith(f'{weights[0]}\n\nlayer1.nl: proposed, C = 64')


def test_table(inspect: Command, weights: tuple[Path, list[Spectrum]]) -> None:
    path, expected = weights
    code, out, err = inspect(path, '-q')
    assert (code, err) == (0, '')
    title = out.splitlines()[2]
    assert title == "layer1.nl: proposed, C = 64, C' = 32; random weights: 16.0 ± 0.6 of 32 negative"
    rows = [line.replace('/', ' ').split() for line in out.splitlines()[4:]]
    assert [[int(value) for value in row[:3]] for row in rows] == [
        [record.index, record.neg_top, record.pos_top] for record in expected]
    for row, record in zip(rows, expected, strict=True):
        numbers = (record.lambda_min, record.lambda_max, record.trace, record.alignment, record.neg_energy,
                   record.spectral_norm, record.stable_rank, record.effective_rank, record.nonnormality)
        assert [float(value) for value in row[3:]] == pytest.approx(numbers, abs=0.06)
    _, legend, _ = inspect(path)
    assert legend.startswith(out.rstrip()) and 'positive eigenvalues diffuse' in legend and len(legend) > len(out)
    assert max(map(len, legend.splitlines())) <= 120


def test_json_is_the_records(inspect: Command, weights: tuple[Path, list[Spectrum]]) -> None:
    path, expected = weights
    code, out, err = inspect(path.parent, '--json')
    assert (code, err) == (0, '')
    document = json.loads(out)
    (stage,) = document['targets'][0]['stages']
    assert document['schema'] == 'timm_nonlocal.inspect/1' and stage['name'] == 'layer1.nl'
    assert stage['blocks'] == [json.loads(json.dumps(record.to_dict())) for record in expected]
    assert inspect(path.parent, '--format', 'json')[1] == out  # the same bytes


def test_csv(inspect: Command, weights: tuple[Path, list[Spectrum]]) -> None:
    _, out, _ = inspect(weights[0], '--format', 'csv', '--stability')
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [int(row['neg_top']) for row in rows] == [record.neg_top for record in weights[1]]
    assert [tuple(map(float, row['eigenvalues'].split())) for row in rows] == [
        record.eigenvalues for record in weights[1]]
    assert all(float(row['kappa']) > 1 for row in rows)


def test_markdown(inspect: Command, weights: tuple[Path, list[Spectrum]]) -> None:
    _, out, _ = inspect(weights[0], '--format', 'markdown')
    table = [line for line in out.splitlines() if line.startswith('|')]
    assert len(table) == 4 and len({line.count('|') for line in table}) == 1
    assert f'| 0 | {weights[1][0].neg_top}/{weights[1][0].pos_top} |' in table[2]


def test_output_file(inspect: Command, weights: tuple[Path, list[Spectrum]], tmp_path: Path) -> None:
    shown = inspect(weights[0], '--json')[1]
    assert inspect(weights[0], '--json', '-o', tmp_path / 'out.json') == (0, '', '')
    assert (tmp_path / 'out.json').read_text() == shown and not list(tmp_path.glob('.*'))
    code, _, err = inspect(weights[0], '-o', tmp_path / 'missing' / 'out')
    assert code == 2 and err.count('\n') == 1


def test_colour(inspect: Command, weights: tuple[Path, list[Spectrum]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of counts far from what random weights show, and not where NO_COLOR is set or nobody looks."""
    model: Any = timm.create_model('preresnet20_nl_proposed_k1')
    block = model.layer1.nl.sub_blocks[0]
    block.z.weight.data.mul_(0.1).sub_(block.g.weight.data.T)
    save_file(model.state_dict(), weights[0])
    assert '\033[34m' in inspect(weights[0], '-q', '--color', 'always')[1]
    assert '\033' not in inspect(weights[0], '-q')[1]
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False)
    assert '\033[34m' in inspect(weights[0], '-q')[1]
    assert '\033' not in inspect(weights[0], '-q', '--color', 'never')[1]
    monkeypatch.setenv('NO_COLOR', '1')
    assert '\033' not in inspect(weights[0], '-q')[1]


def test_a_reader_that_stops_and_a_terminal_without_greek(weights: tuple[Path, list[Spectrum]]) -> None:
    command = f'{sys.executable} -m timm_nonlocal.inspect {weights[0]}'
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONIOENCODING': 'ascii'}
    result = subprocess.run(f'{command} | head -n 1; {command}', shell=True, env=env, capture_output=True, timeout=300)
    assert result.stderr == b'' and result.stdout.isascii() and b'random weights: 16.0 ? 0.6' in result.stdout


def test_filters_and_top(inspect: Command) -> None:
    document = json.loads(inspect('preresnet20_nl_original_k1x3', '--stage', 'layer[23].*', '--top', '5', '--json')[1])
    stages = document['targets'][0]['stages']
    assert [stage['name'] for stage in stages] == ['layer2.nl', 'layer3.nl']
    assert all(block['top_k'] == 5 for stage in stages for block in stage['blocks'])
    document = json.loads(inspect('preresnet20_nl_original_k3.cifar100', '--block', '1', '--all', '--json')[1])
    (block,) = document['targets'][0]['stages'][0]['blocks']
    assert (block['index'], block['top_k'], block['neg_top'], block['flags']) == (1, 64, 32, ['untrained'])


def test_list(inspect: Command, weights: tuple[Path, list[Spectrum]]) -> None:
    code, out, _ = inspect(weights[0], '--list')
    assert code == 0 and out.count('\n') == 2 and 'layer1.nl.sub_blocks.1\tproposed' in out


def test_several_targets_and_epochs(inspect: Command, weights: tuple[Path, list[Spectrum]], tmp_path: Path) -> None:
    code, out, _ = inspect(weights[0], 'preresnet20_nl_original_k1.cifar100', '-q')
    assert code == 0 and out.count('layer1.nl:') == 2 and 'untrained: freshly initialised' in out


# stability and images

def test_stability(inspect: Command, weights: tuple[Path, list[Spectrum]]) -> None:
    path, expected = weights
    (target,) = json.loads(inspect(path, '--stability', '--json')[1])['targets']
    (stage,) = target['stages']
    state = load_file(path)
    for block in stage['blocks']:
        prefix = f'layer1.nl.sub_blocks.{block["index"]}'
        w = state[f'{prefix}.z.weight'].double() @ state[f'{prefix}.g.weight'].double()
        norm = torch.linalg.matrix_norm(torch.eye(64, dtype=torch.float64) - w, ord=2).item()
        assert block['stability']['kappa'] == pytest.approx(max(1, norm))
        values = torch.linalg.eigvals(w).abs().sort(descending=True).values[:32]
        found = [abs(complex(*value)) for value in block['stability']['eigenvalues']]
        assert found == pytest.approx(values.tolist())
    assert stage['stability']['mu_basis'] == 'assumed' and len(expected) == 2
    code, out, _ = inspect(path, '--mu-max', '2', '-q')
    assert code == 0 and 'stability for mu_max = 2' in out and 'all in a row: kappa' in out


def test_data_dir(inspect: Command, small_cifar_here: Path, tmp_path: Path) -> None:
    model = timm.create_model('preresnet20_nl_proposed_k2', nl_args={'symmetric': True})
    save_for_hf(model, str(tmp_path), model_args={'nl_args': {'symmetric': True}}, safe_serialization=True)
    arguments = (tmp_path, '--data-dir', small_cifar_here, '--num-images', 2)
    code, out, err = inspect(*arguments, '-q')
    assert (code, err) == (0, '')
    assert 'A on images: a row looks at' in out and 'predictions on 2 images' in out
    (target,) = json.loads(inspect(*arguments, '--json')[1])['targets']
    assert set(target['images']['accuracy']) == {'learned', 'uniform', 'identity'}
    measured = target['stages'][0]['images']
    assert measured['markov']['reversibility'] < 1e-9 and 0 < measured['mu_max'] <= 1 + 1e-9
    stability = target['stages'][0]['stability']
    assert stability['mu_basis'] == 'bound'
    assert 1 <= measured['kappa_stage'] <= stability['kappa'] * (1 + 1e-3)


def test_images_that_do_not_go_through(inspect: Command, small_cifar_here: Path, tmp_path: Path) -> None:
    gray: Any = timm.create_model('preresnet20_nl_proposed_k1', in_chans=1)
    save_for_hf(gray, str(tmp_path / 'gray'), model_args={'in_chans': 1}, safe_serialization=True)
    code, out, err = inspect(tmp_path / 'gray', '--data-dir', small_cifar_here, '--num-images', 2, '-q')
    assert (code, out) == (3, '') and 'the network does not take these images' in err and 'Traceback' not in err
    model: Any = timm.create_model('preresnet20_nl_proposed_k1')
    model.conv1.weight.data.fill_(float('nan'))
    save_for_hf(model, str(tmp_path / 'nan'), safe_serialization=True)
    code, out, err = inspect(tmp_path / 'nan', '--data-dir', small_cifar_here, '--num-images', 2, '--json')
    (target,) = json.loads(out)['targets']
    assert code == 1 and 'features of the images are not finite' in err
    assert target['images'] is target['stages'][0]['images'] is None


def test_pictures_for_a_bare_file(inspect: Command, weights: tuple[Path, list[Spectrum]], tmp_path: Path) -> None:
    from PIL import Image
    (tmp_path / 'pictures').mkdir()
    Image.new('RGB', (40, 40), (200, 30, 90)).save(tmp_path / 'pictures' / 'one.png')
    arguments = (weights[0], '--images', tmp_path / 'pictures', '-q')
    fails(inspect, 3, 'does not say which network it belongs to: name it with --arch', *arguments)
    fails(inspect, 3, 'no such registered name. Did you mean', *arguments, '--arch', 'preresnet20_nl_proposed_k9')
    fails(inspect, 3, 'the network cannot be built: Error(s) in loading state_dict for PreResNet: Missing key(s)',
          *arguments, '--arch', 'preresnet20_nl_proposed_k3')
    code, out, err = inspect(*arguments, '--arch', 'preresnet20_nl_proposed_k2')
    assert (code, err) == (0, '') and 'predictions on 1 images' in out
    (tmp_path / 'pictures' / 'one.png').unlink()
    fails(inspect, 3, 'holds no picture', *arguments, '--arch', 'preresnet20_nl_proposed_k2')


def test_a_control_has_no_kappa_and_that_is_said(inspect: Command, weights: tuple[Path, list[Spectrum]]) -> None:
    save_file(timm.create_model('preresnet20_nl_proposed_k1', nl_args={'affinity': 'uniform'}).state_dict(), weights[0])
    code, out, err = inspect(weights[0], '--stability')
    assert code == 0 and 'all in a row' not in out and 'so that it has no kappa' in err


def test_foreign_blocks_are_not_watched(inspect: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.layers import NonLocalAttn
    save_file({f'nl.{name}': tensor for name, tensor in NonLocalAttn(16).state_dict().items()},
              tmp_path / 'timm.safetensors')
    code, out, err = inspect(tmp_path / 'timm.safetensors', '--stability', '-q')
    assert (code, err) == (0, '') and 'original, C = 16, C\' = 8, BN folded' in out and 'zero_weight' in out


# pictures

@pytest.mark.parametrize('layout', ['grid', 'overlay'])
@pytest.mark.parametrize(('suffix', 'magic'), [('png', b'\x89PNG'), ('svg', b'<?xml'), ('pdf', b'%PDF')])
def test_plot(inspect: Command, weights: tuple[Path, list[Spectrum]], tmp_path: Path, suffix: str, magic: bytes,
              layout: str) -> None:
    pytest.importorskip('matplotlib')
    picture = tmp_path / f'figure.{suffix}'
    arguments = (weights[0], 'preresnet20_nl_original_k3', '--plot', picture, '--layout', layout, '--stability', '-q')
    assert inspect(*arguments)[0] == 0
    data = picture.read_bytes()
    assert data.startswith(magic) and len(data) > 5000 and not list(tmp_path.glob('.*'))
    assert inspect(*arguments)[0] == 0 and picture.read_bytes() == data


def test_plot_shows_the_counts(inspect: Command, weights: tuple[Path, list[Spectrum]], tmp_path: Path) -> None:
    pytest.importorskip('matplotlib')
    import matplotlib
    with matplotlib.rc_context({'svg.fonttype': 'none'}):
        inspect(weights[0], '--plot', tmp_path / 'figure.svg', '--no-share-y')
    text = (tmp_path / 'figure.svg').read_text()
    for record in weights[1]:
        assert f'{record.neg_top}− / {record.pos_top}+' in text
    assert "layer1.nl 1" in text and "C = 64, C' = 32" in text and 'top 32 eigenvalues' in text


def test_plot_that_cannot_be_made(inspect: Command, weights: tuple[Path, list[Spectrum]], tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('matplotlib')
    code, out, err = inspect(weights[0], '--plot', tmp_path / 'figure.gif')
    assert (code, out) == (2, '') and 'name a file that ends in .png, .svg or .pdf' in err
    code, _, err = inspect(weights[0], '--plot', tmp_path / 'missing' / 'figure.png', '-q')
    assert code == 2 and len(err.splitlines()) == 1
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    code, _, err = inspect(weights[0], '--plot', tmp_path / 'figure.png')
    assert code == 2 and "pip install 'timm_nonlocal[plot]'" in err


# exit codes

def test_0_and_1_checks(inspect: Command, weights: tuple[Path, list[Spectrum]]) -> None:
    path, expected = weights
    counts = [record.neg_top for record in expected if record.neg_top is not None]
    most = max(counts)
    assert inspect(path, '--check', f'neg_top<={most}', '--check', 'alignment > -0.5', '-q')[0] == 0
    code, out, err = inspect(path, '--check', f'neg_top<{most}', '--json')
    (check,) = json.loads(out)['checks']
    failing = [record for record in expected if record.neg_top == most]
    assert code == 1 and not check['ok'] and len(check['failures']) == len(failing) == err.count('check failed')
    assert check['failures'][0] == {'target': str(path), 'stage': 'layer1.nl', 'block': failing[0].index, 'value': most}
    assert inspect(path, '--stability', '--check', 'kappa<1.5')[0] == 1


def test_1_weights_that_are_not_finite(inspect: Command, weights: tuple[Path, list[Spectrum]]) -> None:
    model: Any = timm.create_model('preresnet20_nl_proposed_k2')
    model.layer1.nl.sub_blocks[0].g.weight.data[0, 0] = float('nan')
    save_file(model.state_dict(), weights[0])
    code, out, err = inspect(weights[0], '--json', '--stability', '--check', 'neg_top>=0')
    blocks = json.loads(out)['targets'][0]['stages'][0]['blocks']
    assert code == 1 and 'the weights are not finite' in err
    assert (blocks[0]['flags'], blocks[0]['eigenvalues'], blocks[0]['neg_top']) == (['nonfinite'], [], None)
    assert blocks[1]['flags'] == [] and blocks[1]['neg_top'] is not None
    for form in ('table', 'csv', 'markdown'):
        assert inspect(weights[0], '--format', form)[0] == 1


@pytest.mark.parametrize(('scale', 'dtype', 'note'), [
    (1e100, torch.float64, 'the weights are not finite'), (1e30, torch.float32, 'kappa does not fit into float64')])
def test_1_weights_that_overflow(inspect: Command, weights: tuple[Path, list[Spectrum]], scale: float,
                                 dtype: torch.dtype, note: str) -> None:
    model: Any = timm.create_model('preresnet20_nl_proposed_k4').to(dtype)
    for block in model.layer1.nl.sub_blocks:
        block.g.weight.data *= scale
        block.z.weight.data *= scale
    save_file(model.state_dict(), weights[0])
    code, out, err = inspect(weights[0], '--json', '--stability')
    assert code == 1 and len(err.splitlines()) == 1 and note in err
    assert json.loads(out)['targets'][0]['stages'][0]['stability'] is None


def test_counts_are_said_of_as_many_as_random_weights_would_have(inspect: Command,
                                                                 weights: tuple[Path, list[Spectrum]]) -> None:
    """A first block without 32 eigenvalues, or without any number, does not change the heading of the others."""
    model: Any = timm.create_model('preresnet20_nl_proposed_k3')
    model.layer1.nl.sub_blocks[0].g.weight.data.fill_(float('nan'))
    model.layer1.nl.sub_blocks[1].z.weight.data.zero_()
    model.layer1.nl.sub_blocks[2].z.weight.data *= 1e-6
    save_file(model.state_dict(), weights[0])
    _, out, _ = inspect(weights[0], '-q')
    assert 'random weights: 16.0 ± 0.6 of 32 negative' in out and 'top 32 -/+' in out
    zero, small = (line.split() for line in out.splitlines()[5:])
    assert zero[1:3] == ['0/', '0'] and zero[-1] == 'zero_weight' and 'e-0' in small[2]


@pytest.mark.parametrize('arguments', [
    [], ['x', '--jso'], ['x', '--top', '0'], ['x', '--check', 'neg_top'], ['x', '--check', 'color<3'],
    ['x', '--check', 'kappa<2'], ['x', '--key-map', 'g=('], ['x', '--mu-max', '3'], ['x', '--format', 'xml'],
    ['x', '--bn-eps', '-1'], ['x', '--data-dir', 'a', '--images', 'b'], ['x', '--num-images', '0'],
    ['x', '--token', '--no-token'],
])
def test_2_usage(inspect: Command, arguments: list[str]) -> None:
    code, out, err = inspect(*arguments)
    assert (code, out) == (2, '') and 'error: ' in err


def test_3_not_found_or_damaged(inspect: Command, weights: tuple[Path, list[Spectrum]], tmp_path: Path) -> None:
    fails(inspect, 3, 'Did you mean preresnet20_nl_proposed_k', 'preresnet20_nl_proposed_k0')
    fails(inspect, 3, 'no such file or folder', tmp_path / 'gone.safetensors')
    fails(inspect, 6, 'is not in the cache, and this is offline; here is no such file or folder', 'runs/typo')
    (tmp_path / 'empty').mkdir()
    fails(inspect, 3, 'holds no model.safetensors', tmp_path / 'empty')
    (tmp_path / 'cut.safetensors').write_bytes(weights[0].read_bytes()[:-1])
    fails(inspect, 3, 'is not a readable safetensors file', tmp_path / 'cut.safetensors')
    save_file({'sub_blocks.0.g.weight': torch.ones(2, 4, dtype=torch.int32), 'sub_blocks.0.z.weight': torch.ones(4, 2)},
              tmp_path / 'ints.safetensors')
    fails(inspect, 3, 'is int32, not floating point', tmp_path / 'ints.safetensors')


def test_4_no_nonlocal_block(inspect: Command, tmp_path: Path, weights: tuple[Path, list[Spectrum]]) -> None:
    fails(inspect, 4, 'no nonlocal block', 'preresnet20')
    save_file({'att.value.weight': torch.ones(2, 4), 'att.out.weight': torch.ones(4, 2)}, tmp_path / 'near.safetensors')
    fails(inspect, 4, 'att.value.weight with att.out.weight: name them with --key-map', tmp_path / 'near.safetensors')
    code, _, _ = inspect(tmp_path / 'near.safetensors', '--key-map', r'g=value\.weight,z=out\.weight')
    assert code == 0
    fails(inspect, 4, 'that --stage and --block let through', weights[0], '--stage', 'layer3*')


def test_5_unsafe_pickle(inspect: Command, tmp_path: Path) -> None:
    torch.save(NonlocalBlocks(4), tmp_path / 'module.pt')
    fails(inspect, 5, 'is refused', tmp_path / 'module.pt')


def test_6_hub_out_of_reach(inspect: Command) -> None:
    fails(inspect, 6, 'is not in the cache, and this is offline', 'user/repo', '--offline')


def test_the_good_targets_are_shown_and_the_highest_code_wins(inspect: Command, weights: tuple[Path, list[Spectrum]],
                                                              tmp_path: Path) -> None:
    code, out, err = inspect(weights[0], tmp_path / 'gone', 'preresnet20', 'user/repo', '--json')
    targets = json.loads(out)['targets']
    assert code == 6 and len(err.splitlines()) == 3
    assert [bool(target['stages']) for target in targets] == [True, False, False, False]
    assert [target['error'] is None for target in targets] == [True, False, False, False]


def test_verbose_shows_where(inspect: Command, tmp_path: Path) -> None:
    code, _, err = inspect(tmp_path / 'gone', '--verbose')
    assert code == 3 and 'Traceback' in err


def test_remote_target_through_the_command(inspect: Command, weights: tuple[Path, list[Spectrum]],
                                           monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    with serving(files={COMMITS[0]: {'model.safetensors': weights[0]}}) as hub:
        monkeypatch.setenv('HF_ENDPOINT', hub.address)
        code, out, err = inspect('user/repo', '--no-token', '--json')
        target = json.loads(out)['targets'][0]
        assert (code, err) == (0, '') and len(hub.requests) == 2
        assert target['io'] == {'mode': 'range', 'bytes_read': hub.sent, 'bytes_total': weights[0].stat().st_size}
        assert (target['kind'], target['commit'], target['sha256']) == ('hub', COMMITS[0], 'a' * 64)
        assert all(request.authorization is None for request in hub.requests)
        hub.refuse = (403, 'GatedRepo')
        fails(inspect, 6, 'is gated', 'user/repo')


# the golden document

def golden_file(folder: Path) -> Path:
    """Blocks of every flag and layout whose numbers are the same on every machine: small whole numbers."""
    def matrix(rows: int, columns: int, start: int) -> torch.Tensor:
        return torch.tensor([[(start * start + 7 * i * i + 3 * j * j + 5 * i * j) % 11 - 5.0 for j in range(columns)]
                             for i in range(rows)])

    tensors = {
        'stage.theta.weight': matrix(3, 6, 1), 'stage.phi.weight': matrix(3, 6, 2),
        **{f'stage.sub_blocks.{n}.g.weight': matrix(3, 6, n) for n in (0, 1)},
        **{f'stage.sub_blocks.{n}.z.weight': matrix(6, 3, n + 2) for n in (0, 1)},
        'zero.g.weight': matrix(1, 4, 0)[..., None, None], 'zero.z.weight': torch.zeros(4, 1, 1, 1),
        'zero.t.weight': matrix(1, 4, 3)[..., None, None], 'zero.norm.weight': torch.tensor([1.0, -1.0, 2.0, 0.5]),
        'zero.norm.running_var': torch.tensor([3.0, 1.0, 0.25, 1.0]),
        'folded.conv_g.weight': matrix(2, 6, 4)[..., None], 'folded.conv_out.weight': matrix(6, 2, 5)[..., None],
        'folded.norm.weight': torch.tensor([1.0, -1.0, 2.0, 0.5, 1.0, 1.0]),
        'folded.norm.running_var': torch.tensor([3.0, 1.0, 0.25, 1.0, 4.0, 1.0]),
        'broken.g.conv.weight': torch.full((1, 2), float('inf')), 'broken.conv_out.conv.weight': torch.ones(2, 1),
    }
    save_file(tensors, folder / 'golden.safetensors')
    return folder / 'golden.safetensors'


def golden_document(text: str) -> dict:
    document = json.loads(text)
    document['tool'] = dict.fromkeys(document['tool'])
    (target,) = document['targets']
    target['input'] = target['file'] = Path(target['file']).name
    for check in document['checks']:
        for failure in check['failures']:
            failure['target'] = Path(failure['target']).name
    return document


def alike(found: Any, expected: Any, where: str = 'document') -> None:
    """The same structure and values, floats up to rounding."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            alike(found[key], expected[key], f'{where}.{key}')
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, values in enumerate(zip(found, expected, strict=True)):
            alike(*values, f'{where}[{number}]')
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9), where
    else:
        assert found == expected, where


ARGUMENTS = ('--json', '--stability', '--check', 'neg_top<=2', '--check', 'alignment>=-1')


def test_golden_json(inspect: Command, tmp_path: Path) -> None:
    """Made anew, where the schema changes on purpose, by `PYTHONPATH=. python tests/inspect/test_command.py`."""
    code, out, _ = inspect(golden_file(tmp_path), *ARGUMENTS)
    assert code == 1
    alike(golden_document(out), json.loads(GOLDEN.read_text()))


def documented(text: str) -> set[str]:
    return {cell for line in text.splitlines() if line.startswith('| `')
            for cell in line.split('|')[1].replace('`', ' ').replace(',', ' ').split()}


def test_every_field_is_documented() -> None:
    names = documented((ROOT / 'docs' / 'inspect-schema.md').read_text())

    def walk(value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                assert key in names, f'{key} is not in docs/inspect-schema.md'
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(json.loads(GOLDEN.read_text()))


if __name__ == '__main__':
    import contextlib
    import tempfile
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as shown:
        main([str(golden_file(Path(folder))), *ARGUMENTS])
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden_document(shown.getvalue()), indent=1) + '\n')
