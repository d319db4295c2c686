"""`timm.create_model('hf-hub:…', pretrained=True)` in fresh processes, from the Hub double and from a mirror before it.

`--loader=PYTHON` has another environment's client do it, `--olah=OLAH_CLI` puts that mirror to work.
"""

import itertools
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.hub_double import HubDouble
from tests.support.weight_files import NETWORKS, Project, Worker

NAME = f'{NETWORKS[1]}.cifar10'
HUB_NAME = f'hf-hub:alice/{NAME}'
SETUP = """
import timm
import timm_nonlocal
import torch
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
"""
LOAD = """\
if 'do' in ask:
    exec(ask['do'])
try:
    model = timm.create_model(ask['name'], pretrained=True, cache_dir=ask['cache']).eval()
    answer = model(images).tolist()
except Exception as error:
    answer = f'{type(error).__name__}: {error}'"""


@pytest.fixture(scope='module')
def start(request: pytest.FixtureRequest, project: Project) -> Iterator[Any]:
    """Starts a process that loads what it is asked for. Environment variables are the client's."""
    workers = []

    def start(hub: HubDouble, home: Path, *wrapper: str, **more: str) -> Worker:
        env = project.environment(**{**project.client(hub, home), **more})
        workers.append(Worker(SETUP, LOAD, env, project.root, request.config.getoption('--loader'), wrapper))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


@pytest.fixture(scope='module')
def loader(start: Any, published: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One such process that every test here shares, with a cache of its own for every load."""
    worker, home = start(published[0], tmp_path_factory.mktemp('loader')), tmp_path_factory.mktemp('caches')
    numbers = itertools.count()

    def load(name: str = HUB_NAME, cache: Any = None, **more: Any) -> Any:
        return worker(name=name, cache=str(cache or home / str(next(numbers))), **more)[0]

    return load


@pytest.fixture
def hub(published: Any) -> Iterator[Any]:
    hub, _, _ = published
    hub.reset()
    yield hub
    hub.store.repositories[f'alice/{NAME}'].private = hub.store.repositories[f'alice/{NAME}'].gated = False


@pytest.fixture(scope='module')
def logits(loader: Any) -> Any:
    """Those of the weights in the package."""
    logits = loader(NAME)
    assert isinstance(logits, list), logits
    return logits


def test_the_hub_gives_the_network_of_the_package(hub: HubDouble, loader: Any, logits: Any) -> None:
    (tag,) = hub.store.repositories[f'alice/{NAME}'].tags
    head = hub.store.repositories[f'alice/{NAME}'].branches['main']
    for revision in ('', f'@{tag}', f'@{head}'):
        assert loader(HUB_NAME + revision) == logits


def test_without_our_import_timm_knows_no_such_model(
        hub: HubDouble, project: Project, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    done = subprocess.run(
        [request.config.getoption('--loader'), '-c', f'import timm; timm.create_model({HUB_NAME!r}, pretrained=True)'],
        env=project.environment(**project.client(hub, tmp_path)), capture_output=True, text=True)
    assert done.returncode == 1 and 'Unknown model' in done.stderr


def test_a_second_load_comes_from_the_cache(hub: HubDouble, loader: Any, logits: Any, tmp_path: Path) -> None:
    assert loader(cache=tmp_path) == logits
    hub.reset()
    assert loader(cache=tmp_path) == logits and not hub.requests('GET', 'safetensors|objects')


LOGIN, LOGOUT = "import os; os.environ['HF_TOKEN'] = 'hf_bob'", "import os; os.environ.pop('HF_TOKEN', None)"


@pytest.mark.parametrize(('state', 'login', 'name', 'error'), [
    ('', LOGOUT, 'hf-hub:alice/nothing', '401'), ('private', LOGOUT, HUB_NAME, '401'),
    ('', LOGIN, 'hf-hub:alice/nothing', 'RepositoryNotFoundError'),
    ('private', LOGIN, HUB_NAME, 'RepositoryNotFoundError'), ('gated', LOGIN, HUB_NAME, 'GatedRepoError'),
    ('', LOGOUT, f'{HUB_NAME}@nowhere', 'RevisionNotFoundError'),
], ids=['401-missing', '401-private', '404-missing', '404-private', '403-gated', '404-revision'])
def test_what_may_not_or_cannot_be_loaded(
        hub: HubDouble, loader: Any, state: str, login: str, name: str, error: str) -> None:
    """The client calls a 401 a missing repository, but only for addresses that start with https."""
    hub.add_account('bob', 'hf_bob')
    if state:
        setattr(hub.store.repositories[f'alice/{NAME}'], state, True)
    try:
        assert error in loader(name, do=login)
    finally:
        loader(NAME, do=LOGOUT)


@pytest.mark.parametrize('fault', [
    dict(method='GET', path='/objects/', cut=300_000), dict(method='GET', path='/objects/', cut=0),
    dict(method='GET', path='config.json', cut=5),
], ids=['weights', 'nothing', 'config'])
def test_a_connection_that_breaks_off(hub: HubDouble, loader: Any, logits: Any, fault: Any) -> None:
    fault = hub.fail(**fault)
    result = loader()
    assert fault.times == 0
    if isinstance(result, str):  # an old client gives up where a new one continues; never half a file
        result = loader()
    assert result == logits


def test_a_server_that_ignores_ranges_and_breaks_off(hub: HubDouble, loader: Any, logits: Any) -> None:
    hub.ignores_ranges = True
    hub.fail('GET', '/objects/', cut=300_000)
    result = loader()
    assert (loader() if isinstance(result, str) else result) == logits


@pytest.mark.parametrize(('status', 'path'), [(429, '/objects/'), (503, '/objects/'), (429, '/resolve/'),
                                              (503, '/resolve/')])
def test_errors_that_pass(hub: HubDouble, loader: Any, logits: Any, status: int, path: str) -> None:
    """The client waits and goes on, or says so and the next call succeeds from the same cache."""
    fault = hub.fail('GET' if 'objects' in path else 'HEAD', path, status=status, headers={'Retry-After': '0'})
    result = loader()
    assert fault.times == 0
    if isinstance(result, str):
        assert str(status) in result or 'LocalEntryNotFoundError' in result
        result = loader()
    assert result == logits


def test_offline(hub: HubDouble, start: Any, loader: Any, logits: Any, tmp_path: Path) -> None:
    offline = start(hub, tmp_path / 'home', HF_HUB_OFFLINE='1')
    answer, _ = offline(name=HUB_NAME, cache=str(tmp_path / 'cache'))
    assert isinstance(answer, str) and ('LocalEntryNotFoundError' in answer or 'OfflineModeIsEnabled' in answer)
    assert loader(cache=tmp_path / 'cache') == logits
    hub.reset()
    assert offline(name=HUB_NAME, cache=str(tmp_path / 'cache'))[0] == logits and hub.log == []


FREE_SPACE = {
    'disk': 'import os; assert os.system("mount -o remount,size=64m " + ask["disk"]) == 0',
    'limit': 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (resource.RLIM_INFINITY,))',
}


@pytest.mark.parametrize('kind', FREE_SPACE)
def test_a_full_cache_disk(hub: HubDouble, start: Any, logits: Any, tmp_path: Path, kind: str) -> None:
    """The load fails and leaves nothing that a later one, with space, would take for the file."""
    disk = tmp_path / 'disk'
    wrapper: tuple[str, ...]
    disk.mkdir()
    if kind == 'disk':
        if subprocess.run(['unshare', '-rm', 'mount', '-t', 'tmpfs', 'tmpfs', disk], capture_output=True).returncode:
            pytest.skip('no small file system can be mounted here')
        wrapper = ('unshare', '-rm', 'sh', '-c', f'mount -t tmpfs -o size=400k tmpfs {disk} && exec "$0" "$@"')
    else:
        wrapper = ('sh', '-c', 'ulimit -Sf 400 && exec "$0" "$@"')
    worker = start(hub, disk / 'home', *wrapper)
    answer, _ = worker(name=HUB_NAME, cache=str(disk / 'cache'))
    assert isinstance(answer, str) and ('No space left' in answer or 'File too large' in answer), answer
    answer, _ = worker(name=HUB_NAME, cache=str(disk / 'cache'), do=FREE_SPACE[kind], disk=str(disk))
    assert answer == logits


@pytest.fixture
def mirror(request: pytest.FixtureRequest, published: Any, tmp_path: Path) -> Iterator[Any]:
    """olah, a read-only mirror, in front of the double; its address."""
    command, hub = request.config.getoption('--olah'), published[0]
    if not command:
        pytest.skip('olah-cli is not installed: pip install olah, or --olah=OLAH_CLI')
    with socket.create_server(('127.0.0.1', 0)) as free:
        address = f'127.0.0.1:{free.getsockname()[1]}'
    options = {'host': '127.0.0.1', 'port': address.split(':')[1], 'hf-scheme': 'http', 'mirror-scheme': 'http',
               'hf-netloc': hub.url.split('//')[1], 'hf-lfs-netloc': hub.cdn_url.split('//')[1],
               'mirror-netloc': address, 'mirror-lfs-netloc': address, 'repos-path': str(tmp_path / 'repos')}
    with open(tmp_path / 'olah.log', 'w') as log:
        process = subprocess.Popen([command, *(part for name, value in options.items() for part in
                                               (f'--{name}', value))], cwd=tmp_path, stdout=log, stderr=log)
    for _ in range(120):
        assert process.poll() is None, (tmp_path / 'olah.log').read_text()
        with socket.socket() as client:
            if client.connect_ex(('127.0.0.1', int(options['port']))) == 0:
                break
        time.sleep(0.5)
    yield f'http://{address}'
    process.terminate()
    process.wait(30)


def test_through_a_mirror(hub: HubDouble, mirror: str, start: Any, logits: Any, tmp_path: Path) -> None:
    worker = start(hub, tmp_path / 'home', HF_ENDPOINT=mirror)
    assert worker(name=HUB_NAME, cache=str(tmp_path / 'first'))[0] == logits
    hub.reset()
    assert worker(name=HUB_NAME, cache=str(tmp_path / 'second'))[0] == logits
    assert not hub.requests('GET', '/objects/'), 'the mirror keeps what it has read'


def test_transformers_wrapper(hub: HubDouble, project: Project, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """After importing our package, transformers loads the published folder as any timm model, with its labels."""
    code = """
import timm, timm_nonlocal, torch
from transformers import AutoImageProcessor, AutoModelForImageClassification
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
ours = timm.create_model('NAME', pretrained=True).eval()
theirs = AutoModelForImageClassification.from_pretrained('alice/NAME').eval()
state = theirs.timm_model.state_dict()
assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
torch.testing.assert_close(theirs(images).logits, ours(images), rtol=1e-5, atol=1e-6)
assert theirs.config.id2label[0] == 'airplane', theirs.config.id2label
AutoImageProcessor.from_pretrained('alice/NAME')
"""
    python = request.config.getoption('--loader')
    if subprocess.run([python, '-c', 'import transformers'], capture_output=True).returncode:
        pytest.skip('transformers is not installed beside the loading Python')
    env = project.environment(**project.client(hub, tmp_path))
    done = subprocess.run([python, '-c', code.replace('NAME', NAME)], env=env, cwd=project.root, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
