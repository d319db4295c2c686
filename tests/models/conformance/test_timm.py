"""timm's own model tests, from the source distribution of the installed timm, unchanged, on every model of ours."""

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from itertools import cycle
from pathlib import Path

import pytest
import timm

from tests.support.networks import package_with_weights
from timm_nonlocal.models.preresnet import ARCHITECTURES
from timm_nonlocal.models.pretrained import TAGS

HERE = Path(__file__).parent
TESTS = {  # every test of the file that takes a model of any family
    'test_model_forward', 'test_model_backward', 'test_model_default_cfgs', 'test_model_forward_torchscript',
    'test_model_forward_features', 'test_model_forward_intermediates_features', 'test_model_forward_intermediates',
    'test_prune_intermediate_layers_contract', 'test_model_forward_fx', 'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
}
PRETRAINED = {'test_model_load_pretrained', 'test_model_features_pretrained'}


@pytest.fixture(scope='session')
def timm_tests(request: pytest.FixtureRequest) -> Path:
    """The folder of timm's tests, fetched once and kept in pytest's cache; skips where pip cannot have it."""
    cache = request.config.cache.mkdir('timm-sdist')
    folder = cache / f'timm-{timm.__version__}' / 'tests'
    if not folder.is_dir():
        pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps',
               '--no-binary', 'timm', '--dest', str(cache), f'timm=={timm.__version__}']
        try:
            result = subprocess.run(pip, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip('pip had no answer within two minutes about the source distribution of timm')
        archive = cache / f'timm-{timm.__version__}.tar.gz'
        if not archive.is_file():
            why = [line for line in result.stderr.splitlines() if line.strip()] or ['no reason given']
            pytest.skip(f'pip cannot have the source distribution of timm {timm.__version__}: {why[-1]}')
        with tarfile.open(archive) as tar:
            tar.extractall(cache, filter='data')
    if not (folder / 'test_models.py').is_file():
        pytest.skip(f'the source distribution of timm {timm.__version__} has no tests/test_models.py')
    return folder


def passed(timm_tests: Path, folder: Path, architectures: list[str]) -> dict[str, set[str]]:
    """Runs the file on these models of ours: the tests that passed, by model. Fails where one did not pass."""
    report = folder / 'report.xml'
    env = {key: value for key, value in os.environ.items() if key != 'GITHUB_ACTIONS'}  # timm leaves tests out there
    env |= {'TIMM_NONLOCAL_MODELS': ' '.join(architectures), 'PYTHONPATH': os.pathsep.join([str(folder), str(HERE)]),
            'CUDA_VISIBLE_DEVICES': '', 'HF_HUB_OFFLINE': '1'}
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'timm_ours', '-p', 'no:cacheprovider', '-q', '-W', 'ignore',
         '--rootdir', str(timm_tests), '-c', os.devnull, '--tb=short', f'--junit-xml={report}',
         str(timm_tests / 'test_models.py')],
        cwd=folder, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    tests: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter('testcase'):
        assert case.find('skipped') is None, case.attrib
        test, _, parameters = case.attrib['name'].partition('[')
        tests.setdefault(parameters.rstrip(']').split('-')[-1], set()).add(test)
    return tests


def check(timm_tests: Path, folder: Path, architectures: list[str]) -> None:
    """Every test on every architecture, and on its tags the tests of tags; every other tag has weights."""
    weighted = [f'{name}.{tag}' for name, tag in zip(architectures, cycle(TAGS), strict=False)
                if name in ARCHITECTURES]
    package_with_weights(folder, *weighted)
    tests, text = passed(timm_tests, folder, architectures), (timm_tests / 'test_models.py').read_text()
    there = {test for test in TESTS if f'def {test}(' in text}  # timm 1.0.29 has one less
    assert len(there) >= len(TESTS) - 1
    for name in architectures:
        assert tests.pop(name) == there - {'test_model_default_cfgs'}, name
        for tag in TAGS if name in ARCHITECTURES else ['a1_in1k']:
            expected = {'test_model_default_cfgs'} | (PRETRAINED if f'{name}.{tag}' in weighted else set())
            assert tests.pop(f'{name}.{tag}') == expected, f'{name}.{tag}'
    assert not tests


def test_timms_own_tests(timm_tests: Path, tmp_path: Path) -> None:
    check(timm_tests, tmp_path, [
        'preresnet20', 'preresnet20_nl_original_k2', 'preresnet20_nl_proposed_k3', 'preresnet20_nl_proposed_k1x3'])


@pytest.mark.slow
def test_timms_own_tests_on_all_models(timm_tests: Path, tmp_path: Path) -> None:
    check(timm_tests, tmp_path, [*ARCHITECTURES, *timm.list_models(module='resnet_nl')])
