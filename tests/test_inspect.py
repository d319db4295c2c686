"""The inspect command as a user runs it: what it prints, and one clear line for each thing that can be wrong."""

import json
import struct

import pytest
import timm
from safetensors.torch import save_file

from conftest import run
from timm_nonlocal.spectrum import spectra


def inspect(*arguments):
    return run('-m', 'timm_nonlocal.inspect', *map(str, arguments))


@pytest.fixture
def weights(tmp_path):
    model = timm.create_model('preresnet20_nl_proposed_k2')
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    return tmp_path / 'model.safetensors', spectra(model.state_dict())


def test_table_and_json_of_file_and_folder(weights):
    path, expected = weights
    table = inspect(path)
    assert (table.returncode, table.stderr) == (0, '')
    rows = [line.split() for line in table.stdout.splitlines()[-2:]]
    assert [[int(value) for value in row[:3]] for row in rows] == [
        [record.index, record.negative, record.positive] for record in expected]
    assert [float(row[-2]) for row in rows] == pytest.approx([record.trace for record in expected], abs=1e-4)

    result = inspect(path.parent, '--json')
    assert (result.returncode, result.stderr) == (0, '')
    document = json.loads(result.stdout)
    assert document['schema'] == 'timm_nonlocal.inspect/1'
    assert document['targets'][0]['blocks'] == [json.loads(json.dumps(record.to_dict())) for record in expected]


def test_registered_name_says_that_it_is_untrained():
    result = inspect('preresnet20_nl_original_k4')
    assert result.returncode == 0 and result.stderr == ''
    assert 'untrained' in result.stdout.splitlines()[0]
    assert [line.split()[0] for line in result.stdout.splitlines()[-4:]] == ['0', '1', '2', '3']


@pytest.mark.parametrize(('suffix', 'magic'), [('png', b'\x89PNG'), ('svg', b'<?xml'), ('pdf', b'%PDF')])
def test_plot(weights, tmp_path, suffix, magic):
    pytest.importorskip('matplotlib')
    picture = tmp_path / f'figure.{suffix}'
    assert inspect(weights[0], 'preresnet20_nl_original_k3', '--plot', picture).returncode == 0
    assert picture.read_bytes().startswith(magic) and picture.stat().st_size > 5000
    assert not list(tmp_path.glob('.part*'))


def fails(code, message, *targets):
    """One line for each target, each with the message, and nothing else."""
    result = inspect(*targets)
    assert (result.returncode, result.stdout) == (code, ''), result
    lines = result.stderr.splitlines()
    assert len(lines) == len(targets) and all(message in line for line in lines), result.stderr


def test_unknown_name_names_near_ones():
    fails(3, 'Did you mean preresnet20_nl_proposed_k', 'preresnet20_nl_proposed_k0')


def test_missing_file_and_folder(tmp_path):
    fails(3, 'no such file, folder or registered name', tmp_path / 'gone.safetensors')
    fails(3, 'holds no model.safetensors', tmp_path)


def test_truncated_file_and_a_file_of_something_else(weights, tmp_path):
    data = weights[0].read_bytes()
    contents = [data[:length] for length in (0, 4, 100, len(data) - 1)] + [struct.pack('<Q', 2 ** 60) + b'{}']
    paths = [tmp_path / f'{number}.safetensors' for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    fails(3, 'is not a readable safetensors file', *paths)


def test_no_nonlocal_block(tmp_path):
    path = tmp_path / 'plain.safetensors'
    save_file(timm.create_model('preresnet20').state_dict(), path)
    fails(4, 'has no nonlocal block', path)


def test_weights_that_are_not_finite(weights):
    path, _ = weights
    model = timm.create_model('preresnet20_nl_proposed_k2')
    model.layer1.nl.sub_blocks[0].g.weight.data[0, 0] = float('nan')
    save_file(model.state_dict(), path)
    fails(3, 'not finite', path)


def test_the_good_targets_are_shown_and_the_worst_code_wins(weights, tmp_path):
    result = inspect(weights[0], tmp_path / 'gone', 'preresnet20')
    assert result.returncode == 4 and len(result.stderr.splitlines()) == 2
    assert str(weights[0]) in result.stdout


def test_plot_that_cannot_be_written(weights, tmp_path):
    pytest.importorskip('matplotlib')
    result = inspect(weights[0], '--plot', tmp_path / 'figure.nonsense')
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / 'figure.nonsense').exists()


def test_usage():
    assert inspect().returncode == 2
    assert inspect('preresnet20_nl_proposed_k1', '--jso').returncode == 2
