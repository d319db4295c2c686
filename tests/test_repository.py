"""What holds of the repository as a whole."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion as Version

import timm_nonlocal
from tests.support.process import ROOT, run


def test_lint() -> None:
    result = subprocess.run([sys.executable, '-m', 'ruff', 'check', '.'], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(Version(torch.__version__) < Version('2.14'), reason="older torch's own types lack overloads")
def test_types() -> None:
    result = subprocess.run([sys.executable, '-m', 'mypy'], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def imported(path: Path) -> set[str]:
    """What is imported anywhere in a file, by its first name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition('.')[0])
    return found - sys.stdlib_module_names


def test_every_import_is_declared() -> None:
    text = (ROOT / 'pyproject.toml').read_text()
    lists = dict(re.findall(r'^(\w+) = \[(.*?)\]', text, re.S | re.M))
    own, plot, train = (set(re.findall(r'"([a-z_0-9]+)[">]', lists[name]))
                        for name in ('dependencies', 'plot', 'train'))
    own |= {'PIL', 'triton', 'timm_nonlocal'}  # pillow's name; torch brings its triton
    for folder, declared in {'timm_nonlocal': own | plot, 'train': own | train | {'train', 'hub', 'ray'},
                             'hub': own | plot | {'hub'}}.items():
        for path in (ROOT / folder).rglob('*.py'):
            assert imported(path) <= declared, f'{path}: {imported(path) - declared}'


def test_ci_runs_the_readmes_test_command() -> None:
    readme, ci = ((ROOT / name).read_text() for name in ('README.md', '.ci/run'))
    command = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest"
    assert readme.split('## Test\n')[1].split('```')[1] == f'sh\n{command}\n'
    assert '^## Test$' in ci and 'python3 -m venv' in ci


def test_every_module_says_what_it_is() -> None:
    for room in ('timm_nonlocal', 'train', 'hub', 'benchmarks'):
        for path in (ROOT / room).rglob('*.py'):
            assert path.read_text().startswith('"""'), path


def test_importing_the_package_is_light() -> None:
    """It adds under 0.3 s to `import timm`, and nothing that draws or trains."""
    code = ('import timm, time, sys; start = time.perf_counter(); import timm_nonlocal; '
            'print(time.perf_counter() - start, *({"matplotlib", "accelerate"} & sys.modules.keys()))')
    results = [run('-c', code).stdout.split() for _ in range(3)]
    assert all(len(result) == 1 for result in results), results
    assert min(float(result[0]) for result in results) < 0.3, results


def test_everything_public_has_a_docstring() -> None:
    for name in timm_nonlocal.__all__:
        assert getattr(timm_nonlocal, name).__doc__
