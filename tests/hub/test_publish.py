"""The publishing command, whole, against the Hub double: nothing here was published anywhere."""

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support.hub_double import HubDouble, xet
from tests.support.hub_double.store import Blob
from tests.support.weight_files import NETWORKS, PUBLISH, PUBLISHER, UNVERIFIED, Project, Worker

NAMES = [f'{network}.cifar10' for network in NETWORKS]
PLAIN, NONLOCAL = NAMES
NUMBERS = itertools.count(1)
UPLOADS = r'/commit/|/objects/|info/lfs|preupload'


def uploads(log: Any) -> list:
    return [line for line in log if line.method in ('POST', 'PUT') and re.search(UPLOADS, line.path)]


def test_publishes_everything_and_verifies_it(published: Any, project: Project) -> None:
    hub, command, _ = published
    assert (command.returncode, command.stderr) == (0, ''), command
    lines = command.stdout.splitlines()
    assert [line.split('@')[0] for line in lines] == [f'alice/{name}' for name in NAMES]
    assert all('files' in line and line.endswith('verified') for line in lines)
    for name in NAMES:
        repository = hub.store.repositories[f'alice/{name}']
        files = repository.commits[repository.branches['main']].files
        weights = (project.root / f'timm_nonlocal/weights/{name}.safetensors').read_bytes()
        assert files['model.safetensors'].data == weights
        pictures = {'curve.png', 'curve.csv'} | ({'spectrum.png', 'inspect.json'} if name == NONLOCAL else set())
        assert files.keys() == {'.gitattributes', 'model.safetensors', 'config.json', 'README.md', *pictures}
        assert repository.tags == {f'weights-{files["model.safetensors"].sha256[:12]}': repository.branches['main']}


def test_what_is_published_names_no_path_and_no_placeholder(published: Any, project: Project) -> None:
    hub, _, _ = published
    repository = hub.store.repositories[f'alice/{NONLOCAL}']
    files = repository.commits[repository.branches['main']].files
    config = json.loads(files['config.json'].data)
    assert config['architecture'] == NONLOCAL.split('.')[0] and len(config['label_names']) == 10
    assert 'num_classes' not in config.get('model_args', {}) and 'file' not in config['pretrained_cfg']
    card = files['README.md'].data.decode()
    assert f"'hf-hub:alice/{NONLOCAL}'" in card and 'NAMESPACE' not in card
    assert '\n![The top eigenvalues of every block](spectrum.png)\n' in card
    assert files['curve.csv'].data.splitlines()[0].split(b',') == [b'epoch', b'train_loss', b'train_error',
                                                                  b'test_error']
    for path, blob in files.items():
        assert str(project.root).encode() not in blob.data, path


def test_verification_read_as_a_stranger_and_inspect_read_ranges(published: Any) -> None:
    _, _, log = published
    assert not [line for line in log if line.method in ('GET', 'HEAD') and '/resolve/' in line.path and line.authorized]
    ranges = [line.range for line in log if line.server == 'cdn' and line.method == 'GET' and line.range]
    assert ranges, 'inspect read no range'


def test_publishing_again_uploads_nothing(published: Any, project: Project, tmp_path: Path) -> None:
    """From a folder that is built anew: what did not change is built to the same bytes."""
    hub, _, _ = published
    hub.reset()
    again = project.run('-c', PUBLISH, NONLOCAL, '--namespace', 'alice',
                        **project.client(hub, tmp_path, HF_TOKEN='hf_alice'))
    assert (again.returncode, again.stderr) == (0, ''), again
    assert 'nothing to upload' in again.stdout and again.stdout.endswith('verified\n')
    assert uploads(hub.log) == []


def test_through_xet(project: Project, tmp_path: Path) -> None:
    if not xet.works():
        pytest.skip('hf_xet has no local storage here')
    with HubDouble(xet=True) as hub:
        hub.add_account('alice', 'hf_alice')
        done = project.run('-c', PUBLISH, NONLOCAL, '--namespace', 'alice', '--private',
                       **project.client(hub, tmp_path, HF_TOKEN='hf_alice'))
        assert (done.returncode, done.stderr) == (0, ''), done
        repository = hub.store.repositories[f'alice/{NONLOCAL}']
        files = repository.commits[repository.branches['main']].files
        assert repository.private and files['model.safetensors'].xet_hash
        assert not hub.requests('PUT') and hub.requests('GET', 'xet-write-token') and hub.requests('GET', 'xet-read')


@pytest.fixture(scope='module')
def hub() -> Iterator[Any]:
    with HubDouble() as hub:
        yield hub


@pytest.fixture(scope='module')
def publisher(hub: HubDouble, project: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The command in one process, with folders built once and no verification: what the Hub answers is at test."""
    worker = Worker(UNVERIFIED, PUBLISHER, project.environment(
        **project.client(hub, tmp_path_factory.mktemp('home'), HF_TOKEN='hf_alice')), project.root)
    yield lambda *argv: worker(argv=argv)
    worker.close()


@pytest.fixture
def namespace(hub: HubDouble) -> str:
    """One of this test's own, in which alice may write."""
    hub.reset()
    name = f'org{next(NUMBERS)}'
    hub.add_account('alice', 'hf_alice', organizations=(name,))
    return name


def test_no_access_stops_at_once(hub: HubDouble, publisher: Any, namespace: str) -> None:
    for account, message in ((None, 'hf auth login'), (('bob', 'hf_alice'), 'the token may not write there'),
                             (('alice', 'hf_alice', 'read', (namespace,)), 'the token may not write there')):
        hub.store.accounts.clear()
        if account:
            hub.add_account(*account)
        code, said = publisher('--namespace', namespace)
        assert code == 1 and message in said.splitlines()[0] and ': create: ' in said.splitlines()[0]
        assert [line for line in said.splitlines() if line.startswith('missing')] == [
            f'missing: {namespace}/{PLAIN}: create, upload, tag, verify',
            f'missing: {namespace}/{NONLOCAL}: build, create, upload, tag, verify']
    assert len(hub.requests('POST', '/api/repos/create')) == 3 and not uploads(hub.log)


@pytest.mark.parametrize(('fault', 'step', 'message'), [
    (dict(method='POST', path='/api/repos/create', status=500), 'create', '500'),
    (dict(method='GET', path='/api/models/', status=404), 'upload', '404'),
    (dict(method='POST', path='/commit/', status=412, message='A commit has happened since'), 'upload', 'someone else'),
    (dict(method='POST', path='/commit/', status=429), 'upload', 'too many requests'),
    (dict(method='POST', path='/commit/', status=503), 'upload', '503'),
    (dict(method='POST', path='/commit/', cut=10), 'upload', 'disconnected'),
    (dict(method='POST', path='/commit/', mute=True), 'upload', 'disconnected'),
    (dict(method='POST', path='/tag/', status=409, message='Tag reference exists already'), 'tag', 'exists already'),
    (dict(method='GET', path='/refs', status=502), 'tag', '502'),
], ids=['500-create', '404', '412', '429', '503', 'cut', 'cut-after', '409', '502-tag'])
def test_a_failure_says_what_is_missing_and_the_same_command_continues(
        hub: HubDouble, publisher: Any, namespace: str, fault: Any, step: str, message: str) -> None:
    hub.fail(**fault)
    code, said = publisher('--namespace', namespace)
    steps = ('build', 'create', 'upload', 'tag', 'verify')
    first, *rest = [line for line in said.splitlines() if not line.startswith(namespace)]
    assert code == 1 and first.startswith(f'error: {namespace}/{PLAIN}: {step}: ') and message in first
    assert rest == [f'missing: {namespace}/{PLAIN}: {", ".join(steps[steps.index(step):])}',
                    'the same command continues']
    assert f'{namespace}/{NONLOCAL}@' in said, 'the others must not suffer'

    stored = len(hub.requests('PUT', server='cdn'))
    code, said = publisher('--namespace', namespace)
    assert code == 0 and [line.split('@')[0] for line in said.splitlines()] == [f'{namespace}/{n}' for n in NAMES]
    assert 'nothing to upload' in said.splitlines()[1]
    if '/commit/' in fault['path'] or step == 'tag':
        assert len(hub.requests('PUT', server='cdn')) == stored, 'what was stored once was sent again'
    hub.reset()
    assert publisher('--namespace', namespace)[0] == 0 and uploads(hub.log) == []


@pytest.mark.parametrize('fault', [
    dict(method='PUT', path='/objects/', status=503), dict(method='PUT', path='/objects/', cut=2000),
    dict(method='POST', path='/preupload/', status=429, headers={'Retry-After': '0'}),
], ids=['503', 'cut', '429'])
def test_what_the_client_tries_again_by_itself(hub: HubDouble, publisher: Any, namespace: str, fault: Any) -> None:
    fault = hub.fail(**fault)
    code, said = publisher(NONLOCAL, '--namespace', namespace)
    assert fault.times == 0 and code == 0, said


def test_only_what_changed_is_uploaded_and_a_tag_never_moves(hub: HubDouble, publisher: Any, namespace: str) -> None:
    repo = f'{namespace}/{NONLOCAL}'
    assert publisher(NONLOCAL, '--namespace', namespace)[0] == 0
    repository = hub.store.repositories[repo]
    first = repository.branches['main']
    repository.commit('main', 'someone edits', {**repository.commits[first].files, 'README.md': Blob(b'---\n---\n'),
                                                'more.txt': Blob(b'theirs')}, None)
    hub.reset()
    code, said = publisher(NONLOCAL, '--namespace', namespace)
    assert code == 0 and '1 files' in said and not hub.requests('PUT')
    head = repository.commits[repository.branches['main']]
    assert head.files['README.md'] == repository.commits[first].files['README.md'] and 'more.txt' in head.files
    assert list(repository.tags.values()) == [first]

    (tag,) = repository.tags
    repository.tags[tag] = next(oid for oid, commit in repository.commits.items() if commit.parent is None)
    code, said = publisher(NONLOCAL, '--namespace', namespace)
    assert code == 1 and f'the tag {tag} exists and holds other weights' in said


def test_dry_run_lists_the_files_without_a_network(
        hub: HubDouble, publisher: Any, namespace: str, project: Project) -> None:
    code, said = publisher(NONLOCAL, '--namespace', namespace, '--dry-run')
    assert code == 0 and hub.log == []
    listed = {line.split()[0]: line.split()[1:] for line in said.splitlines()}
    weights = project.root / f'timm_nonlocal/weights/{NONLOCAL}.safetensors'
    assert listed.keys() == {f'{namespace}/{NONLOCAL}', 'model.safetensors', 'config.json', 'README.md', 'curve.png',
                             'curve.csv', 'spectrum.png', 'inspect.json'}
    assert listed['model.safetensors'] == [f'{weights.stat().st_size:,}', json.loads(
        (project.root / 'hub/results.jsonl').read_text().splitlines()[1])['sha256']]


def test_another_branch(hub: HubDouble, publisher: Any, namespace: str) -> None:
    code, _ = publisher(NONLOCAL, '--namespace', namespace, '--revision', 'next')
    repository = hub.store.repositories[f'{namespace}/{NONLOCAL}']
    assert code == 0 and repository.branches.keys() == {'main', 'next'}
    assert repository.commits[repository.branches['main']].files.keys() == {'.gitattributes'}
    assert 'model.safetensors' in repository.commits[repository.branches['next']].files
    assert publisher(NONLOCAL, '--namespace', namespace, '--revision', 'next')[0] == 0


def test_private_uploads_to_no_public_repository(hub: HubDouble, publisher: Any, namespace: str) -> None:
    repo = f'{namespace}/{PLAIN}'
    for visible in ('public', 'private'):
        hub.store.create(repo, visible == 'private') if repo not in hub.store.repositories else None
        hub.store.repositories[repo].private = visible == 'private'
        code, said = publisher('--namespace', namespace, '--private', '--revision', 'next')
        repository = hub.store.repositories[repo]
        if visible == 'public':
            first, *_ = [line for line in said.splitlines() if line.startswith('error')]
            assert code == 1 and first == (f'error: {repo}: create: the repository exists and is public: make it '
                                           f'private there, or leave out --private')
            assert f'missing: {repo}: create, upload, tag, verify' in said
            assert repository.branches.keys() == {'main'} and not repository.tags
            assert not [line for line in uploads(hub.log) if f'/{PLAIN}' in line.path]
            assert hub.store.repositories[f'{namespace}/{NONLOCAL}'].private, 'the others are published'
        else:
            assert code == 0 and repository.private and 'next' in repository.branches


def test_arguments_that_are_off(publisher: Any, namespace: str) -> None:
    code, said = publisher('preresnet20_nl_proposed_k3.cifar10', '--namespace', namespace)
    assert (code, said) == (2, f'error: preresnet20_nl_proposed_k3.cifar10 has no weights; these have: {NONLOCAL}, '
                               f'{PLAIN}\n')
    code, said = publisher('--namespace', 'a/b')
    assert code == 2 and said.endswith('--namespace a/b: write the name of a user or an organisation alone\n')


@pytest.mark.parametrize(('env', 'message'), [
    pytest.param({'HF_HUB_OFFLINE': '1'}, 'offline', id='offline'),
    pytest.param({'HF_ENDPOINT': 'http://127.0.0.1:9'}, 'refused', id='down', marks=pytest.mark.slow)])
def test_without_the_hub(
        publisher: Any, published: Any, project: Project, tmp_path: Path, env: Any, message: str) -> None:
    env = {**project.client(published[0], tmp_path, HF_TOKEN='hf_alice'), **env}
    done = project.run('-c', PUBLISH, PLAIN, '--namespace', 'alice', **env)
    first, *rest = done.stderr.splitlines()
    assert done.returncode == 1 and message in first.lower(), done.stderr
    assert rest == [f'missing: alice/{PLAIN}: create, upload, tag, verify', 'the same command continues']


def test_verification_notices_other_weights(published: Any, project: Project, tmp_path: Path) -> None:
    """The package's files change after publishing: sha256 differs, and so does what inspect finds."""
    hub, _, _ = published
    hub.reset()
    copy = Project(tmp_path / 'copy')
    shutil.copytree(project.root, copy.root)
    for name, key in ((NONLOCAL, 'layer1.nl.sub_blocks.0.g.weight'), (PLAIN, 'fc.weight')):
        path = copy.root / f'timm_nonlocal/weights/{name}.safetensors'
        tensors = load_file(path)
        tensors[key] = tensors[key] * 2
        save_file(tensors, path)
    done = copy.run('-c', 'import sys; from hub.verify import main\n'
                          'for name in sys.argv[1:]: print(main([name, f"alice/{name}", "main"]))', *NAMES,
                    **project.client(hub, tmp_path))
    assert done.stdout == '1\n1\n'
    plain, nonlocal_ = done.stderr.splitlines()
    assert plain.startswith('model.safetensors has sha256 ') and nonlocal_ == 'inspect finds another spectrum there'
