"""What holds of the repository as a whole."""

import subprocess
import sys

import timm_nonlocal
from tests.support.process import ROOT, run


def test_lint():
    result = subprocess.run([sys.executable, '-m', 'ruff', 'check', '.'], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_ci_runs_the_readmes_test_command():
    readme, ci = ((ROOT / name).read_text() for name in ('README.md', '.ci/run'))
    command = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest"
    assert readme.split('## Test\n')[1].split('```')[1] == f'sh\n{command}\n'
    assert '^## Test$' in ci and 'python3 -m venv' in ci


def test_every_module_says_what_it_is():
    for path in [*ROOT.glob('timm_nonlocal/**/*.py'), *ROOT.glob('train/*.py'), *ROOT.glob('hub/*.py')]:
        assert path.read_text().startswith(('"""', '#!')), path


def test_importing_the_package_is_light():
    """It adds under 0.3 s to `import timm`, and nothing that draws or trains."""
    code = ('import timm, time, sys; start = time.perf_counter(); import timm_nonlocal; '
            'print(time.perf_counter() - start, *({"matplotlib", "accelerate"} & sys.modules.keys()))')
    results = [run('-c', code).stdout.split() for _ in range(3)]
    assert all(len(result) == 1 for result in results), results
    assert min(float(result[0]) for result in results) < 0.3, results


def test_everything_public_has_a_docstring():
    for name in timm_nonlocal.__all__:
        assert getattr(timm_nonlocal, name).__doc__
