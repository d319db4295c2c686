"""python -m timm_nonlocal SCRIPT: the script runs as if it had been called itself, and finds our networks."""

import subprocess
from pathlib import Path

import pytest

from tests.support.process import run

SCRIPT = """
import sys
import neighbour
import timm
print(__name__, __file__, sys.argv, neighbour.NAME, timm.is_model('preresnet20_nl_proposed_k5'))
def fail():
    raise ValueError('as asked')
if sys.argv[1:] == ['raise']:
    fail()
sys.exit(sys.argv[1] if sys.argv[1:] == ['words'] else int(sys.argv[1]))
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / 'neighbour.py').write_text("NAME = 'beside it'\n")
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    return path


def called(*arguments: str) -> subprocess.CompletedProcess:
    return run('-m', 'timm_nonlocal', *arguments)


@pytest.mark.parametrize('code', [0, 7])
def test_name_arguments_and_exit_code(script: Path, code: int) -> None:
    result = called(str(script), str(code))
    assert result.returncode == code and not result.stderr
    assert result.stdout == f"__main__ {script} {[str(script), str(code)]} beside it True\n"


def test_what_it_exits_with_in_words(script: Path) -> None:
    result = called(str(script), 'words')
    assert (result.returncode, result.stderr) == (1, 'words\n')


def test_its_own_traceback(script: Path) -> None:
    """To the letter what Python prints where it runs the script itself, with the package imported first."""
    ours = called(str(script), 'raise')
    script.write_text(f'import timm_nonlocal\n{SCRIPT}'.replace('\n\n', '\n', 1))  # on the same lines
    alone = run(str(script), 'raise')
    assert ours.returncode == alone.returncode == 1
    assert ours.stderr == alone.stderr and 'as asked' in ours.stderr and 'runpy' not in ours.stderr


@pytest.mark.parametrize(('arguments', 'code', 'said'), [
    ([], 2, 'python -m timm_nonlocal SCRIPT'), (['no.py'], 2, 'error: no.py: no such script'),
    (['--help'], 0, '')])
def test_without_a_script(arguments: list[str], code: int, said: str) -> None:
    result = called(*arguments)
    assert result.returncode == code and said in result.stderr and 'Traceback' not in result.stderr


def test_timms_own_library_sees_the_networks(tmp_path: Path) -> None:
    """What timm's scripts do, through its library: a data set of pictures, its loader, the network's own settings."""
    from PIL import Image
    for label in range(2):
        (tmp_path / 'pictures' / str(label)).mkdir(parents=True)
        Image.new('RGB', (32, 32), (100 * label, 0, 50)).save(tmp_path / 'pictures' / str(label) / 'one.png')
    script = tmp_path / 'validate.py'
    script.write_text("""
import sys
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
model = timm.create_model(sys.argv[1], pretrained=True).eval()
config = resolve_data_config({}, model=model)
loader = create_loader(create_dataset('', sys.argv[2]), config['input_size'], 2, use_prefetcher=False,
                       mean=config['mean'], std=config['std'], crop_pct=config['crop_pct'], num_workers=0)
with torch.no_grad():
    for images, labels in loader:
        print(tuple(model(images).shape), config['mean'], labels.tolist())
""")
    result = called(str(script), 'preresnet20_nl_proposed_k5', str(tmp_path / 'pictures'))
    assert result.stdout == '(2, 10) (0.4914, 0.4822, 0.4465) [0, 1]\n', result.stderr
