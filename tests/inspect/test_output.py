"""Where the report goes: what is there is never lost, and one line says what stands in its way."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.one_line import Command, fails
from tests.support.process import run
from timm_nonlocal.analysis.spectra import Spectrum

FULL = Path('/dev/full')


@pytest.mark.parametrize('flag', ['-q', '--list'])
@pytest.mark.skipif(not FULL.exists(), reason='Linux has it')
def test_a_full_disk_behind_standard_output(weights: tuple[Path, list[Spectrum]], flag: str) -> None:
    code = (f"import os, sys; os.dup2(os.open('{FULL}', os.O_WRONLY), 1); from timm_nonlocal.inspect import main; "
            f"sys.exit(main(['{weights[0]}', '{flag}']))")
    result = run('-c', code)
    assert (result.returncode, result.stderr) == (2, 'error: standard output: No space left on device\n')


def test_what_was_written_before_stays_where_no_target_can_be_read(inspect: Command, tmp_path: Path) -> None:
    (tmp_path / 'out').write_text('before')
    fails(inspect, 3, 'no such file', tmp_path / 'gone.pth', '-o', tmp_path / 'out')
    assert (tmp_path / 'out').read_text() == 'before'


@pytest.mark.parametrize('arguments', [['-o', 'x.txt'], ['--html', 'x.html', '-o', 'out']])
def test_a_file_where_a_folder_should_be(inspect: Command, weights: tuple[Path, list[Spectrum]], tmp_path: Path,
                                         arguments: list[str]) -> None:
    arguments = [*arguments[:-1], str(tmp_path / arguments[-1])] if 'out' in arguments else arguments
    arguments[1] = f'{weights[0]}/{arguments[1]}'
    fails(inspect, 2, 'No such folder', weights[0], *arguments)


@pytest.mark.parametrize('flag', [('--check', 'neg_top<=1.2.3'), ('--check', 'neg_top<.'), ('--bn-eps', 'nan'),
                                  ('--bn-eps', 'inf'), ('--timeout', 'nan')])
def test_numbers_that_are_none(inspect: Command, flag: tuple[str, str]) -> None:
    code, out, err = inspect('x', *flag)
    assert (code, out) == (2, '') and err.splitlines()[-1].count(flag[0]) == 1


def test_a_name_with_dollars_is_no_formula(inspect: Command, weights: tuple[Path, list[Spectrum]],
                                           tmp_path: Path) -> None:
    pytest.importorskip('matplotlib')
    save_file({f'a$x_{{$.{name}': tensor for name, tensor in load_file(weights[0]).items()}, tmp_path / '$_{$.pt')
    for layout in ('grid', 'overlay'):
        code, _, err = inspect(tmp_path / '$_{$.pt', '--plot', tmp_path / 'figure.png', '--layout', layout, '-q')
        assert (code, err) == (0, '')
