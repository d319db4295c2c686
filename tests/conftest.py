"""What the tests share: options, small data made on the spot, and a way to run our commands as a user does."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hub_double import HubDouble
from small_data import accepted
from zoo import Zoo

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test may wait for a server


def pytest_addoption(parser):
    parser.addoption('--data-dir', help='folder with the real CIFAR files, for the tests marked cifar')
    parser.addoption('--loader', metavar='PYTHON', default=sys.executable,
                     help='the Python, perhaps with another huggingface_hub, that loads what the tests publish')
    parser.addoption('--olah', metavar='OLAH_CLI', default=shutil.which('olah-cli'),
                     help='the command of the mirror olah, to stand in front of the Hub double')


def pytest_collection_modifyitems(config, items):
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
def cifar_dir(request) -> str:
    """The real data."""
    return request.config.getoption('--data-dir')


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """Small tensors are quicker on one thread than on all, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _write_batch(folder: Path, name: str, fields: dict) -> str:
    data = pickle.dumps(fields, protocol=2)
    (folder / name).write_bytes(data)
    return hashlib.md5(data).hexdigest()


def make_cifar10(folder: Path, per_batch: int = 24, test: int = 20) -> Path:
    """A CIFAR-10 folder of random images whose label shows in their colour, in the published layout.

    torchvision checks the published md5 sums; `md5.json` holds those of these files, which `accept` puts in place, and
    the folder's `sitecustomize.py` calls it in every Python process that has the folder on its path.
    """
    generator = np.random.default_rng(0)
    base = folder / 'cifar-10-batches-py'
    base.mkdir(parents=True)
    sums = {}
    for name, count in [*((f'data_batch_{i}', per_batch) for i in range(1, 6)), ('test_batch', test)]:
        labels = generator.integers(0, 10, count)
        images = generator.integers(0, 120, (count, 3, 1024)) + labels[:, None, None] * 12
        sums[name] = _write_batch(base, name, {'data': images.astype(np.uint8).reshape(count, -1),
                                               'labels': labels.tolist()})
    sums['batches.meta'] = _write_batch(base, 'batches.meta', {'label_names': [f'class{i}' for i in range(10)]})
    (folder / 'md5.json').write_text(json.dumps(sums))
    (folder / 'sitecustomize.py').write_text(
        f'import sys\nsys.path.append({str(ROOT / "tests")!r})\n'
        f'from small_data import accept_when_imported\naccept_when_imported({str(folder / "md5.json")!r})\n')
    return folder


@pytest.fixture(scope='session')
def small_cifar(tmp_path_factory) -> Path:
    """120 training and 20 test images in CIFAR-10's layout."""
    return make_cifar10(tmp_path_factory.mktemp('cifar'))


@pytest.fixture(scope='session')
def zoo(small_cifar, tmp_path_factory) -> Zoo:
    """A copy of the project with two briefly trained networks and their cards."""
    return Zoo.make(tmp_path_factory.mktemp('zoo'), small_cifar)


@pytest.fixture(scope='session')
def published(zoo, tmp_path_factory):
    """The Hub double, and the finished command that published the zoo there by LFS."""
    with HubDouble() as hub:
        hub.add_account('alice', 'hf_alice')
        env = zoo.client(hub, tmp_path_factory.mktemp('home'), HF_TOKEN='hf_alice')
        command = zoo.run('-m', 'hub.publish', '--namespace', 'alice', **env)
        yield hub, command, list(hub.log)


@pytest.fixture
def small_cifar_here(small_cifar, monkeypatch) -> Path:
    """The same, accepted in this process too."""
    from torchvision.datasets import CIFAR10
    for name, value in accepted(CIFAR10, small_cifar / 'md5.json').items():
        monkeypatch.setattr(CIFAR10, name, value)
    return small_cifar


def run(*command: str, data: Path | None = None, env: dict | None = None, **options) -> subprocess.CompletedProcess:
    """Runs `python …` in a process of its own, with the small data's md5 sums where `data` is given."""
    path = [str(ROOT), *([str(data)] if data else [])]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(path), 'CUDA_VISIBLE_DEVICES': '', **(env or {})}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=600, **options)
