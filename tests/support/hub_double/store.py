"""What the double keeps, in memory: accounts, repositories, their commits, branches and tags, and large objects."""

import hashlib
import threading
from dataclasses import dataclass, field


class Refused(Exception):
    """An answer that is an error: its status, its message, the Hub's `X-Error-Code`, and more headers or body."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None,
                 **body: str) -> None:
        super().__init__(message)
        self.status, self.code, self.headers, self.body = status, code, headers or {}, {'error': message, **body}


@dataclass(frozen=True)
class Account:
    name: str
    role: str = 'write'
    organizations: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organizations


@dataclass(frozen=True)
class Blob:
    """A file of a commit; a large one is a pointer in git and has its bytes in the object storage."""

    data: bytes
    large: bool = False
    xet_hash: str | None = None

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n'.encode()

    @property
    def oid(self) -> str:
        """git's name of the file, or of the pointer to it."""
        content = self.pointer if self.large else self.data
        return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        """The commit of a branch, a tag or a full hash. Raises Refused 404."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refused(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return self.commits[oid]

    def commit(self, branch: str, title: str, files: dict[str, Blob], parent: str | None) -> Commit:
        """Makes `files` the new head of a branch. Raises Refused 412 where `parent` is not its head any more."""
        head = self.branches.get(branch)
        if parent is not None and not (head or '').startswith(parent):
            raise Refused(412, 'A commit has happened since. Please refresh and try again.')
        named = repr((head, title, len(self.commits), sorted((path, blob.oid) for path, blob in files.items())))
        new = Commit(hashlib.sha1(named.encode()).hexdigest(), head, title, files)
        self.commits[new.oid], self.branches[branch] = new, new.oid
        return new


class Store:
    """Everything behind the two servers. `lock` is held by whoever answers a request."""

    ATTRIBUTES = b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.accounts: dict[str, Account] = {}
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[tuple[str, str], bytes] = {}  # by repository and sha256

    def create(self, repo_id: str, private: bool) -> Repository:
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit('main', 'initial commit', {'.gitattributes': Blob(self.ATTRIBUTES)}, None)
        return repository

    def readable(self, repo_id: str, account: Account | None) -> Repository:
        """A repository that the account may see. Raises Refused 401 or 404, which hide a private one alike."""
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and not (account and account.owns(repo_id.split('/')[0]))):
            if account is None:
                raise Refused(401, 'Invalid username or password.')
            raise Refused(404, 'Repository not found', 'RepoNotFound')
        return repository

    def may_write(self, namespace: str, account: Account | None) -> None:
        """Raises Refused 401 or 403 where the account may not write under a namespace."""
        if account is None:
            raise Refused(401, 'Invalid username or password.')
        if not account.owns(namespace):
            raise Refused(403, f"You don't have the rights to create a model under the namespace \"{namespace}\"")
        if account.role != 'write':
            raise Refused(403, 'Forbidden: this token has no write permission')
