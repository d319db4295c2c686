"""What the Hub's endpoints answer, as far as the ordinary client uses them."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote

import yaml  # type: ignore[import-untyped]

from .store import Account, Blob, Commit, Refused, Repository

REPO = r'(?P<repo>[^/]+/[^/]+)'
REVISION = r'(?P<revision>[^/]+)'
SHA256 = '(?P<sha256>[0-9a-f]{64})'
LARGE = ('.safetensors', '.bin', '.pt', '.pth')
ROUTES: dict[str, list[tuple[str, re.Pattern, Callable]]] = {'hub': [], 'cdn': []}


class Call(NamedTuple):
    """One request. `hub` is the double."""

    hub: Any
    method: str
    path: str
    query: dict[str, list[str]]
    body: bytes
    account: Account | None

    def json(self) -> Any:
        return json.loads(self.body or b'{}')

    def read(self, repo_id: str) -> Repository:
        return self.hub.store.readable(repo_id, self.account)

    def write(self, repo_id: str) -> Repository:
        repository = self.read(repo_id)
        self.hub.store.may_write(repo_id.split('/')[0], self.account)
        return repository


def route(method: str, pattern: str, server: str = 'hub') -> Callable[[Callable], Callable]:
    def add(function: Callable) -> Callable:
        ROUTES[server].append((method, re.compile(pattern), function))
        return function
    return add


def answer(call: Call, server: str) -> tuple:
    """Status, body and headers. Raises Refused."""
    for method, pattern, function in ROUTES[server]:
        match = pattern.fullmatch(call.path)
        if match and call.method in (method, 'HEAD' if method == 'GET' else method):
            return function(call, **{name: unquote(value or '') for name, value in match.groupdict().items()})
    raise Refused(404, f'the double has no {call.method} {call.path}')


@route('GET', '/api/whoami-v2')
def whoami(call: Call) -> tuple:
    if call.account is None:
        raise Refused(401, 'Invalid username or password.')
    return 200, {'type': 'user', 'name': call.account.name,
                 'orgs': [{'type': 'org', 'name': name} for name in call.account.organizations],
                 'auth': {'type': 'access_token',
                          'accessToken': {'displayName': 'double', 'role': call.account.role}}}


@route('POST', '/api/validate-yaml')
def validate_yaml(call: Call) -> tuple:
    found = re.match(r'---\n(.*?)\n---(\n|$)', call.json()['content'], re.DOTALL)
    errors = [] if found else [{'message': 'no metadata at the start of the card'}]
    try:
        data = yaml.safe_load(found[1]) if found else {}
        if not isinstance(data, dict):
            errors.append({'message': 'the metadata is not a mapping'})
        elif not isinstance(data.get('license', ''), str) or not isinstance(data.get('tags', []), list):
            errors.append({'message': '"license" must be a string and "tags" a list'})
    except yaml.YAMLError as error:
        errors.append({'message': str(error)})
    return (400 if errors else 200), {'errors': errors, 'warnings': []}


@route('POST', '/api/repos/create')
def create(call: Call) -> tuple:
    wish = call.json()
    namespace = wish.get('organization') or (call.account.name if call.account else '')
    call.hub.store.may_write(namespace, call.account)
    repo_id = f'{namespace}/{wish["name"]}'
    url = f'{call.hub.url}/{repo_id}'
    if repo_id in call.hub.store.repositories:
        raise Refused(409, 'You already created this model repo', url=url)
    call.hub.store.create(repo_id, wish.get('visibility') == 'private' or bool(wish.get('private')))
    return 200, {'url': url, 'name': repo_id, 'id': repo_id}


@route('DELETE', '/api/repos/delete')
def delete(call: Call) -> tuple:
    wish = call.json()
    owner = wish.get('organization') or (call.account and call.account.name)
    repo_id = f'{owner}/{wish["name"]}'
    call.write(repo_id)
    del call.hub.store.repositories[repo_id]
    return 200, {}


def _entry(path: str, blob: Blob) -> dict:
    entry = {'type': 'file', 'path': path, 'size': len(blob.data), 'oid': blob.oid}
    if blob.large:
        entry['lfs'] = {'oid': blob.sha256, 'size': len(blob.data), 'pointerSize': len(blob.pointer)}
    if blob.xet_hash:
        entry['xetHash'] = blob.xet_hash
    return entry


@route('GET', f'/api/models/{REPO}(/revision/{REVISION})?')
def model_info(call: Call, repo: str, revision: str) -> tuple:
    repository = call.read(repo)
    commit = repository.find(revision or 'main')
    return 200, {'_id': hashlib.sha1(repo.encode()).hexdigest()[:24], 'id': repo, 'modelId': repo, 'sha': commit.oid,
                 'author': repo.split('/')[0], 'private': repository.private, 'disabled': False, 'downloads': 0,
                 'likes': 0, 'gated': 'auto' if repository.gated else False, 'tags': [],
                 'lastModified': '2026-01-01T00:00:00.000Z', 'createdAt': '2026-01-01T00:00:00.000Z',
                 'siblings': [{'rfilename': path} for path in commit.files]}


@route('GET', f'/api/models/{REPO}/tree/{REVISION}')
def tree(call: Call, repo: str, revision: str) -> tuple:
    """Pages of at most 1,000 entries, or of `limit`, with a Link header to the next."""
    files = sorted(call.read(repo).find(revision).files.items())
    first, limit = (int(call.query.get(name, [default])[0]) for name, default in (('cursor', 0), ('limit', 1000)))
    headers = {}
    if first + limit < len(files):
        headers['Link'] = f'<{call.hub.url}{call.path}?limit={limit}&cursor={first + limit}>; rel="next"'
    return 200, [_entry(path, blob) for path, blob in files[first:first + limit]], headers


@route('POST', f'/api/models/{REPO}/paths-info/{REVISION}')
def paths_info(call: Call, repo: str, revision: str) -> tuple:
    """The client sends a form here, unlike anywhere else."""
    files = call.read(repo).find(revision).files
    paths = parse_qs(call.body.decode())['paths']
    return 200, [_entry(path, files[path]) for path in paths if path in files]


@route('GET', f'/api/models/{REPO}/refs')
def refs(call: Call, repo: str) -> tuple:
    repository = call.read(repo)
    return 200, {'converts': [],
                 'branches': [{'name': name, 'ref': f'refs/heads/{name}', 'targetCommit': oid}
                              for name, oid in repository.branches.items()],
                 'tags': [{'name': name, 'ref': f'refs/tags/{name}', 'targetCommit': oid}
                          for name, oid in repository.tags.items()]}


@route('GET', f'/api/models/{REPO}/commits/{REVISION}')
def commits(call: Call, repo: str, revision: str) -> tuple:
    repository, history = call.read(repo), []
    commit: Commit | None = repository.find(revision)
    while commit:
        history.append({'id': commit.oid, 'title': commit.title, 'message': '', 'authors': [],
                        'date': '2026-01-01T00:00:00.000Z'})
        commit = repository.commits.get(commit.parent or '')
    return 200, history


@route('POST', f'/api/models/{REPO}/tag/{REVISION}')
def tag(call: Call, repo: str, revision: str) -> tuple:
    repository, name = call.write(repo), call.json()['tag']
    if name in repository.tags:
        raise Refused(409, 'Tag reference exists already')
    repository.tags[name] = repository.find(revision).oid
    return 200, {}


@route('POST', f'/api/models/{REPO}/branch/{REVISION}')
def branch(call: Call, repo: str, revision: str) -> tuple:
    repository = call.write(repo)
    if revision in repository.branches:
        raise Refused(409, 'Reference already exists')
    repository.branches[revision] = repository.find(call.json().get('startingPoint') or 'main').oid
    return 200, {}


def _is_large(path: str, sample: bytes) -> bool:
    return path.endswith(LARGE) or b'\0' in sample


@route('POST', f'/api/models/{REPO}/preupload/{REVISION}')
def preupload(call: Call, repo: str, revision: str) -> tuple:
    present = call.write(repo).find(revision).files
    files = []
    for wish in call.json()['files']:
        large = _is_large(wish['path'], base64.b64decode(wish['sample']))
        files.append({'path': wish['path'], 'uploadMode': 'lfs' if large else 'regular', 'shouldIgnore': False})
        if wish['path'] in present:
            blob = present[wish['path']]
            files[-1]['oid'] = blob.sha256 if blob.large else blob.oid
    return 200, {'files': files}


@route('POST', rf'/{REPO}\.git/info/lfs/objects/batch')
def lfs_batch(call: Call, repo: str) -> tuple:
    call.write(repo)
    objects = []
    for wish in call.json()['objects']:
        objects.append({'oid': wish['oid'], 'size': wish['size']})
        if (repo, wish['oid']) not in call.hub.store.objects:
            objects[-1]['actions'] = {
                'upload': {'href': f'{call.hub.cdn_url}/objects/{repo}/{wish["oid"]}'},
                'verify': {'href': f'{call.hub.url}/{repo}.git/info/lfs/verify/{wish["oid"]}'}}
    transfer = 'xet' if call.hub.xet and 'xet' in call.json()['transfers'] else 'basic'
    return 200, {'transfer': transfer, 'objects': objects}


@route('POST', rf'/{REPO}\.git/info/lfs/verify/{SHA256}')
def lfs_verify(call: Call, repo: str, sha256: str) -> tuple:
    data = call.hub.store.objects.get((repo, sha256))
    if data is None or len(data) != call.json()['size']:
        raise Refused(404, f'no object {sha256} of that size')
    return 200, {}


@route('PUT', f'/objects/{REPO}/{SHA256}', 'cdn')
def put_object(call: Call, repo: str, sha256: str) -> tuple:
    if hashlib.sha256(call.body).hexdigest() != sha256:
        raise Refused(400, 'BadDigest: the bytes are not those that were announced')
    call.hub.store.objects[repo, sha256] = call.body
    return 200, b''


@route('GET', f'/objects/{REPO}/{SHA256}', 'cdn')
def get_object(call: Call, repo: str, sha256: str) -> tuple:
    if (repo, sha256) not in call.hub.store.objects:
        raise Refused(404, 'NoSuchKey')
    return 200, call.hub.store.objects[repo, sha256], {'ETag': f'"{sha256}"', 'Accept-Ranges': 'bytes'}


@route('GET', f'/api/models/{REPO}/xet-(?P<kind>read|write)-token/{REVISION}')
def xet_token(call: Call, repo: str, kind: str, revision: str) -> tuple:
    (call.write if kind == 'write' else call.read)(repo)
    if call.hub.xet is None:
        raise Refused(404, 'Xet storage is not enabled')
    headers = call.hub.xet.token(kind)
    return 200, {'casUrl': headers['X-Xet-Cas-Url'], 'accessToken': headers['X-Xet-Access-Token'],
                 'exp': int(headers['X-Xet-Token-Expiration'])}, headers


def _large_blob(call: Call, repo: str, sha256: str, size: int) -> Blob:
    """The blob of an object uploaded to a repository. Raises Refused 400 where nothing of the kind was."""
    objects, xet_hash = call.hub.store.objects, call.hub.xet and call.hub.xet.find(sha256)
    if xet_hash and (repo, sha256) not in objects:
        objects[repo, sha256] = call.hub.xet.read(sha256, xet_hash, size)
    if (repo, sha256) not in objects:
        raise Refused(400, f'Your push was rejected because an LFS pointer pointed to a file that does not exist: '
                            f'{sha256}')
    return Blob(objects[repo, sha256], large=True, xet_hash=xet_hash)


def _changed(call: Call, repo: str, files: dict[str, Blob], operations: list[dict]) -> dict[str, Blob]:
    files = dict(files)
    for operation in operations:
        value = operation['value']
        if operation['key'] == 'file':
            data = base64.b64decode(value['content'])
            if _is_large(value['path'], data[:512]):
                raise Refused(400, f'{value["path"]} is binary: upload it as a large file')
            files[value['path']] = Blob(data)
        elif operation['key'] == 'lfsFile':
            files[value['path']] = _large_blob(call, repo, value['oid'], value['size'])
        elif operation['key'] == 'deletedFile':
            if files.pop(value['path'], None) is None:
                raise Refused(404, "A file with this name doesn't exist", 'EntryNotFound')
        else:
            raise Refused(400, f'the double does not know {operation["key"]}')
    return files


@route('POST', f'/api/models/{REPO}/commit/{REVISION}')
def commit(call: Call, repo: str, revision: str) -> tuple:
    repository = call.write(repo)
    if revision not in repository.branches:
        raise Refused(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
    header, *operations = map(json.loads, call.body.splitlines())
    parent = header['value'].get('parentCommit')
    files = _changed(call, repo, repository.find(revision).files, operations)
    new = repository.commit(revision, header['value']['summary'], files, parent)
    return 200, {'success': True, 'commitOid': new.oid, 'commitUrl': f'{call.hub.url}/{repo}/commit/{new.oid}'}


def _file(call: Call, repo: str, revision: str, path: str) -> tuple[Commit, Blob]:
    repository = call.read(repo)
    commit = repository.find(revision)
    if repository.gated and not (call.account and call.account.owns(repo.split('/')[0])):
        raise Refused(403 if call.account else 401, f'Access to model {repo} is restricted', 'GatedRepo')
    if path not in commit.files:
        raise Refused(404, 'Entry not found', 'EntryNotFound', {'X-Repo-Commit': commit.oid})
    return commit, commit.files[path]


@route('GET', f'/{REPO}/resolve/{REVISION}/(?P<path>.+)')
def resolve(call: Call, repo: str, revision: str, path: str) -> tuple:
    """Large files are elsewhere (302), small ones under an address that can be cached for ever (307)."""
    commit, blob = _file(call, repo, revision, path)
    headers = {'X-Repo-Commit': commit.oid, 'Accept-Ranges': 'bytes'}
    if not blob.large:
        return 307, b'', {**headers, 'ETag': f'"{blob.oid}"',
                          'Location': f'/api/resolve-cache/models/{repo}/{commit.oid}/{quote(path)}'}
    if blob.xet_hash:
        refresh = f'{call.hub.url}/api/models/{repo}/xet-read-token/{commit.oid}'
        headers |= {'X-Xet-Hash': blob.xet_hash, 'X-Xet-Refresh-Route': refresh,
                    'Link': f'<{refresh}>; rel="xet-auth"'}
    return 302, b'', {**headers, 'X-Linked-Etag': f'"{blob.sha256}"', 'X-Linked-Size': str(len(blob.data)),
                      'ETag': f'"{blob.sha256}"', 'Location': f'{call.hub.cdn_url}/objects/{repo}/{blob.sha256}'}


@route('GET', f'/api/resolve-cache/models/{REPO}/{REVISION}/(?P<path>.+)')
def resolve_cache(call: Call, repo: str, revision: str, path: str) -> tuple:
    commit, blob = _file(call, repo, revision, path)
    return 200, blob.data, {'X-Repo-Commit': commit.oid, 'ETag': f'"{blob.oid}"', 'Accept-Ranges': 'bytes'}
