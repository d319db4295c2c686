"""The options and fixtures of the tests."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tests.support.cifar_files import make_cifar10
from tests.support.hub_double import HubDouble, Request
from tests.support.small_data import accepted
from tests.support.weight_files import Project


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--data-dir', help='folder with the real CIFAR files, for the tests marked cifar')
    parser.addoption('--loader', metavar='PYTHON', default=sys.executable,
                     help='the Python, perhaps with another huggingface_hub, that loads what the tests publish')
    parser.addoption('--olah', metavar='OLAH_CLI', default=shutil.which('olah-cli'),
                     help='the command of the mirror olah, to stand in front of the Hub double')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {
        'gpu': None if torch.cuda.is_available() else 'no CUDA device',
        'cifar': None if config.getoption('--data-dir') else 'no --data-dir with the real CIFAR files',
        'slow': None if 'slow' in (config.getoption('-m') or '') else 'slow: run with -m slow',
    }
    for item in items:
        for marker, reason in skips.items():
            if reason and marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def cifar_dir(request: pytest.FixtureRequest) -> str:
    """The real data."""
    return request.config.getoption('--data-dir')


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors are quicker on one thread than on all, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def small_cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 training and 20 test images in CIFAR-10's layout."""
    return make_cifar10(tmp_path_factory.mktemp('cifar'))


@pytest.fixture(scope='session')
def project(small_cifar: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the project with two briefly trained networks and their cards."""
    return Project.make(tmp_path_factory.mktemp('project'), small_cifar)


@pytest.fixture(scope='session')
def published(project: Project, tmp_path_factory: pytest.TempPathFactory
              ) -> Iterator[tuple[HubDouble, CompletedProcess[str], list[Request]]]:
    """The Hub double, and the finished command that published the project there by LFS."""
    with HubDouble() as hub:
        hub.add_account('alice', 'hf_alice')
        env = project.client(hub, tmp_path_factory.mktemp('home'), HF_TOKEN='hf_alice')
        command = project.run('-m', 'hub.publish', '--namespace', 'alice', **env)
        yield hub, command, list(hub.log)


@pytest.fixture
def small_cifar_here(small_cifar: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, accepted in this process too."""
    from torchvision.datasets import CIFAR10
    for name, value in accepted(CIFAR10, small_cifar / 'md5.json').items():
        monkeypatch.setattr(CIFAR10, name, value)
    return small_cifar
