"""What keeps the Hub double honest: the real client's every step works on it, and what the Hub refuses it refuses."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support import hub_double
from tests.support.hub_double import HubDouble, xet

CLIENT = '''
import json, os, sys, tempfile
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
api, seen, data = HfApi(), {}, os.urandom(700_000)
ID = 'alice/net'

def refused(name, call):
    try:
        call()
    except Exception as error:
        response = getattr(error, 'response', None)
        seen[name] = [type(error).__name__, getattr(response, 'status_code', None), str(error)]

def add(path, content):
    return CommitOperationAdd(path, content)

seen['whoami'] = api.whoami()['name']
api.create_repo(ID)
api.create_repo(ID, exist_ok=True)
refused('create', lambda: api.create_repo(ID))
refused('namespace', lambda: api.create_repo('bob/net'))
first = api.repo_info(ID).sha
made = api.create_commit(ID, [add('model.safetensors', data), add('README.md', b'---\\nlicense: mit\\n---\\n'),
                              add('a picture.png', b'\\x89PNG\\0'), add('deep/er.txt', b'text')],
                         commit_message='all', parent_commit=first).oid
refused('stale', lambda: api.create_commit(ID, [add('x.txt', b'x')], commit_message='x', parent_commit=first))
refused('card', lambda: api.create_commit(ID, [add('README.md', b'---\\nlicense: [\\n---\\n')], commit_message='x'))
seen['same'] = api.create_commit(ID, [add('model.safetensors', data)], commit_message='again').oid == made
api.create_tag(ID, tag='v1')
refused('tag', lambda: api.create_tag(ID, tag='v1'))
api.create_branch(ID, branch='next')
refused('branch', lambda: api.create_branch(ID, branch='next'))
api.create_commit(ID, [CommitOperationDelete('deep/er.txt')], commit_message='less', revision='next')
refs = api.list_repo_refs(ID)
seen['refs'] = [[ref.name for ref in refs.branches], [(ref.name, ref.target_commit == made) for ref in refs.tags]]
seen['commits'] = [commit.title for commit in api.list_repo_commits(ID, revision='next')]
seen['files'] = sorted(api.list_repo_files(ID)), sorted(api.list_repo_files(ID, revision='next'))
folder = snapshot_download(ID, revision='v1')
with open(f'{folder}/model.safetensors', 'rb') as file:
    seen['bytes'] = file.read() == data
seen['picture'] = os.path.getsize(f'{folder}/a picture.png')
refused('file', lambda: api.hf_hub_download(ID, 'nothing.txt'))
refused('revision', lambda: api.hf_hub_download(ID, 'README.md', revision='nothing'))
refused('repository', lambda: api.repo_info('alice/nothing'))
api.delete_repo(ID)
refused('deleted', lambda: api.repo_info(ID))
print(json.dumps(seen))
'''


@pytest.mark.parametrize('with_xet', [False, True], ids=['lfs', 'xet'])
def test_every_step_of_the_real_client(with_xet: bool, tmp_path: Path) -> None:
    if with_xet and not xet.works():
        pytest.skip('hf_xet has no local storage here')
    with HubDouble(xet=with_xet) as hub:
        hub.add_account('alice', 'hf_alice')
        env = {**os.environ, 'HF_ENDPOINT': hub.url, 'HF_TOKEN': 'hf_alice', 'HF_HOME': str(tmp_path),
               'HF_HUB_OFFLINE': '0', 'HF_HUB_DISABLE_XET': str(int(not with_xet)), 'HF_HUB_DISABLE_TELEMETRY': '1'}
        done = subprocess.run([sys.executable, '-c', CLIENT], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        put, tokens = hub.requests('PUT', server='cdn'), hub.requests('GET', 'xet-(read|write)-token')
    seen = json.loads(done.stdout)
    assert seen['whoami'] == 'alice' and seen['same'] and seen['bytes'] and seen['picture'] == 5
    assert (not put and tokens) if with_xet else (len(put) == 2 and not tokens)
    assert not [line for line in put if line.authorized]
    assert seen['refs'] == [['main', 'next'], [['v1', True]]]
    assert seen['commits'] == ['less', 'all', 'initial commit']
    both = ['.gitattributes', 'README.md', 'a picture.png', 'model.safetensors']
    assert seen['files'] == [sorted([*both, 'deep/er.txt']), both]
    assert {name: seen[name][1] for name in ('create', 'namespace', 'stale', 'tag', 'branch', 'repository', 'deleted')
            } == {'create': 409, 'namespace': 403, 'stale': 412, 'tag': 409, 'branch': 409, 'repository': 404,
                  'deleted': 404}
    assert 'Invalid metadata' in seen['card'][2]
    assert [seen[name][0] for name in ('file', 'revision', 'repository')] == [
        'RemoteEntryNotFoundError', 'RevisionNotFoundError', 'RepositoryNotFoundError']


@pytest.fixture
def hub() -> Iterator[Any]:
    with HubDouble() as hub:
        hub.add_account('alice', 'hf_alice')
        hub.store.create('alice/net', private=False)
        yield hub


def ask(hub: HubDouble, method: str, url: str, body: Any = None, token: str | None = 'hf_alice', **headers: str) -> Any:
    """Status, headers and body of one plain request; redirects are not followed."""
    parts = urlsplit(url if '//' in url else hub.url + url)
    connection = HTTPConnection(parts.hostname or '', parts.port, timeout=10)
    if token:
        headers['Authorization'] = f'Bearer {token}'
    connection.request(method, f'{parts.path}?{parts.query}', body, headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def commit(hub: HubDouble, *operations: dict) -> Any:
    lines = [{'key': 'header', 'value': {'summary': 'x'}}, *operations]
    return ask(hub, 'POST', '/api/models/alice/net/commit/main', '\n'.join(map(json.dumps, lines)))


def test_a_pointer_to_nothing_is_rejected(hub: HubDouble) -> None:
    status, _, body = commit(hub, {'key': 'lfsFile', 'value': {'path': 'x.bin', 'oid': 'a' * 64, 'size': 3}})
    assert status == 400 and b'does not exist' in body


def test_other_bytes_than_announced_are_rejected(hub: HubDouble) -> None:
    status, _, _ = ask(hub, 'PUT', f'{hub.cdn_url}/objects/alice/net/{"a" * 64}', b'bytes', token=None)
    assert status == 400 and not hub.store.objects


def test_storage_refuses_the_hubs_token(hub: HubDouble) -> None:
    status, _, body = ask(hub, 'GET', f'{hub.cdn_url}/objects/alice/net/{"a" * 64}')
    assert status == 400 and b'auth' in body


def test_tokens(hub: HubDouble) -> None:
    assert ask(hub, 'GET', '/api/whoami-v2')[0] == 200
    assert ask(hub, 'GET', '/api/whoami-v2', token='hf_wrong')[0] == 401
    hub.add_account('carol', 'hf_carol', role='read', organizations=('alice',))
    assert ask(hub, 'POST', '/api/models/alice/net/tag/main', '{"tag": "t"}', token='hf_carol')[0] == 403
    assert ask(hub, 'POST', '/api/models/alice/net/tag/main', '{"tag": "t"}', token=None)[0] == 401


def test_redirects_and_ranges(hub: HubDouble) -> None:
    data = bytes(range(256)) * 40
    sha256 = hashlib.sha256(data).hexdigest()
    ask(hub, 'PUT', f'{hub.cdn_url}/objects/alice/net/{sha256}', data, token=None)
    commit(hub, {'key': 'lfsFile', 'value': {'path': 'x.bin', 'oid': sha256, 'size': len(data)}},
           {'key': 'file', 'value': {'path': 'x.txt', 'content': base64.b64encode(b'small').decode()}})
    status, headers, _ = ask(hub, 'HEAD', '/alice/net/resolve/main/x.bin')
    assert (status, headers['X-Linked-Etag'], headers['X-Linked-Size']) == (302, f'"{sha256}"', str(len(data)))
    large = headers['Location']
    assert large.startswith(hub.cdn_url)
    status, headers, body = ask(hub, 'GET', large, token=None, Range='bytes=10-19')
    assert (status, headers['Content-Range'], body) == (206, f'bytes 10-19/{len(data)}', data[10:20])
    assert ask(hub, 'GET', large, token=None, Range='bytes=10000-')[2] == data[10000:]
    assert ask(hub, 'GET', large, token=None, Range=f'bytes={len(data)}-')[0] == 416
    hub.ignores_ranges = True
    assert ask(hub, 'GET', large, token=None, Range='bytes=10-19')[::2] == (200, data)
    hub.ignores_ranges = False

    status, headers, _ = ask(hub, 'HEAD', '/alice/net/resolve/main/x.txt')
    assert status == 307 and headers['Location'].startswith('/api/resolve-cache/')
    status, small, body = ask(hub, 'GET', headers['Location'], Range='bytes=1-2')
    assert (status, body) == (206, b'ma') and small['X-Repo-Commit'] == headers['X-Repo-Commit']


def test_pages(hub: HubDouble) -> None:
    commit(hub, *({'key': 'file', 'value': {'path': f'{number}.txt', 'content': ''}} for number in range(5)))
    found, url = [], '/api/models/alice/net/tree/main?limit=4'
    while url:
        status, headers, body = ask(hub, 'GET', url)
        assert status == 200
        found.append([entry['path'] for entry in json.loads(body)])
        url = headers['Link'] and headers['Link'].partition('<')[2].partition('>')[0]
    assert found == [['.gitattributes', '0.txt', '1.txt', '2.txt'], ['3.txt', '4.txt']]


def test_faults_happen_as_often_as_told(hub: HubDouble) -> None:
    hub.fail('GET', '/whoami', status=429, times=2, headers={'Retry-After': '7'})
    answers = [ask(hub, 'GET', '/api/whoami-v2') for _ in range(3)]
    assert [status for status, _, _ in answers] == [429, 429, 200] and answers[0][1]['Retry-After'] == '7'


def test_a_breakdown_of_the_double_itself_is_no_quiet_500() -> None:
    with pytest.raises(RuntimeError, match='the double broke down'), HubDouble() as hub:
        hub.add_account('alice', 'hf_alice')
        assert ask(hub, 'POST', '/api/repos/create', '{"not what": "is asked"}')[0] == 500


def test_it_says_what_it_is() -> None:
    assert 'It is not the Hub, and nothing that reaches it is published.' in hub_double.__doc__
