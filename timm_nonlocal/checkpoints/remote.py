"""Reading from the Hub: from its cache, by ranges, or by a whole download.

A range read is one GET for the header and one for every group of tensors, all of one commit: the first answer names it
and the later requests ask for it. Redirects are the Hub client's, which leaves the token behind at another host.
"""

import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ..errors import first_line
from .tensorfile import CheckpointError, HubError, LocalFile, RangedFile, ShardedFile, TensorFile, UnsafePickleError

__all__ = ['Repo']

FILES = ('model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json')
MAX_INDEX = 25_000_000  # bytes


class RangeIgnored(Exception):
    """The server sends the whole file where a part of it was asked for."""


@dataclass
class Progress:
    """A line on stderr that counts bytes, once it has taken a while and where someone looks."""

    name: str
    total: int | None = None
    read: int = 0
    after: float = 1.0  # seconds
    shown: bool = False

    def __post_init__(self) -> None:
        self.start = self.last = time.monotonic()

    def advance(self, count: int) -> None:
        self.read += count
        now = time.monotonic()
        if now - self.start > self.after and now - self.last > 0.1 and sys.stderr.isatty():
            self.last, self.shown = now, True
            of = f' of {self.total / 1e6:.1f}' if self.total else ''
            print(f'\r{self.name}: {self.read / 1e6:.1f}{of} MB', end='', file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.shown:
            print('\r\033[K', end='', file=sys.stderr, flush=True)


@dataclass
class Repo:
    """One repository on the Hub at one revision.

    Attributes:
        id: 'user/name'.
        revision: a branch, tag or commit; None for main.
        token: None for the stored one, False for none, or the token.
        offline: use the cache alone.
        remote: 'auto' (cache, then ranges, then download), 'range' or 'download'.
        allow_pickle: fetch a pickle where there is nothing else; it is loaded with weights_only.
        timeout: seconds to wait for the server.
        endpoint: the Hub's address; None takes the Hub client's own.
        commit, sha256: of what was read, once something was.
    """

    id: str
    revision: str | None = None
    token: str | bool | None = None
    offline: bool = False
    remote: str = 'auto'
    allow_pickle: bool = False
    timeout: float = 10.0
    endpoint: str | None = None
    commit: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        self.offline = self.offline or constants.HF_HUB_OFFLINE
        self.endpoint = self.endpoint or os.environ.get('HF_ENDPOINT')

    def open(self, filename: str | None, needs: Callable[[list[str]], Any],
             load_pickle: Callable[[Path, str], TensorFile], folder: str = '') -> tuple[TensorFile, str]:
        """The repository's weights and the name of their file.

        Args:
            filename: None tries the usual names.
            needs: as of `ShardedFile`.
            load_pickle: opens a downloaded pickle.
            folder: inside the repository, where the file is.

        Raises:
            CheckpointError, HubError, UnsafePickleError: with what would work.
        """
        names = [str(PurePosixPath(folder) / name) for name in ([filename] if filename else FILES)]
        with self._errors():
            for name in names:
                try:
                    if name.endswith('.index.json'):
                        return ShardedFile(f'{self.id}/{name}', self._text(name), needs,
                                           partial(self._shard, load_pickle, PurePosixPath(name))), name
                    return self._weights(name, load_pickle), name
                except EntryNotFoundError as error:
                    last = error
            if isinstance(last, LocalEntryNotFoundError):
                raise HubError(f'{self.id} is not in the cache, and this is offline')
            raise CheckpointError(f'{self.id} has no {" or ".join(names)}; name a file with --file')

    def text(self, name: str) -> str | None:
        """A small file of the repository as text; None where it has none. Raises HubError."""
        sha256 = self.sha256
        try:
            with self._errors():
                return self._text(name)
        except EntryNotFoundError:
            return None
        finally:
            self.sha256 = sha256  # of the weights

    def _weights(self, name: str, load_pickle: Callable[[Path, str], TensorFile]) -> TensorFile:
        return self._safetensors(name) if name.endswith('.safetensors') else self._pickle(name, load_pickle)

    def _shard(self, load_pickle: Callable[[Path, str], TensorFile], index: PurePosixPath, name: str) -> TensorFile:
        with self._errors():
            try:
                return self._weights(str(index.parent / name), load_pickle)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError as error:
                raise CheckpointError(f'{self.id} has no {name} beside {index}, which names it') from error

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns the Hub client's errors into ours."""
        at = f'{self.id}@{self.revision}' if self.revision else self.id
        network = importlib.import_module(type(get_session()).__module__.partition('.')[0]).HTTPError
        try:
            yield
        except HFValidationError as error:
            raise CheckpointError(f'{self.id} is not the name of a repository: {error}') from error
        except GatedRepoError as error:
            raise HubError(f'{at} is gated: ask for access on its page, then log in with `hf auth login`') from error
        except RepositoryNotFoundError as error:
            raise CheckpointError(f'{at}: no such repository, or a private one: log in with `hf auth login`') from error
        except RevisionNotFoundError as error:
            raise CheckpointError(f'{self.id} has no revision {self.revision or "main"}') from error
        except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
            raise HubError(f'{at} is not in the cache, and this is offline or the Hub out of reach: '
                           f'{first_line(error)}') from error
        except EntryNotFoundError:
            raise  # `open` tries the next name
        except HfHubHTTPError as error:
            raise HubError(f'{at}: the Hub refuses: {first_line(error)}') from error
        except (network, OSError) as error:
            raise HubError(f'{at}: the Hub cannot be reached ({type(error).__name__}: {first_line(error)}); '
                           f'--offline reads the cache alone') from error

    def _cached(self, name: str) -> Path | None:
        path = huggingface_hub.try_to_load_from_cache(self.id, name, revision=self.commit or self.revision)
        if not isinstance(path, str):
            return None
        self.commit = _snapshot(Path(path)) or self.commit
        return Path(path)

    def _file(self, name: str) -> tuple[Path, str]:
        """A whole file and where it came from: 'cache' or 'download'."""
        if self.remote != 'download' or self.offline:
            if path := self._cached(name):
                return path, 'cache'
        if self.offline:
            raise LocalEntryNotFoundError(f'{name} is not in the cache')
        path = Path(huggingface_hub.hf_hub_download(
            self.id, name, revision=self.commit or self.revision, token=self.token, etag_timeout=self.timeout,
            endpoint=self.endpoint))
        self.commit = _snapshot(path) or self.commit
        return path, 'download'

    def _safetensors(self, name: str) -> TensorFile:
        if self.remote == 'auto' or self.offline:
            if path := self._cached(name):
                return LocalFile(path, 'cache')
        if self.remote != 'download' and not self.offline:
            try:
                return self._ranged(name)
            except RangeIgnored:
                if self.remote == 'range':
                    raise HubError(f'{self.id}: the server ignores ranges; read it whole with --remote '
                                   f'download') from None
                print(f'note: the server ignores ranges: {self.id}/{name} is downloaded whole', file=sys.stderr)
        return LocalFile(*self._file(name))

    def _pickle(self, name: str, load_pickle: Callable[[Path, str], TensorFile]) -> TensorFile:
        path = self._cached(name)
        if not self.allow_pickle:
            if not path:
                with suppress(RangeIgnored):
                    self._get(name, 0, 1, Progress(name))  # it may not exist at all
            raise UnsafePickleError(f'{self.id} has its weights in {name}, a pickle: --allow-pickle fetches it and '
                                    f'loads nothing but tensors from it')
        return load_pickle(*self._file(name))

    def _text(self, name: str) -> str:
        if self.remote == 'auto' and not self.offline and not self._cached(name):
            try:
                with closing(Progress(name)) as progress:
                    return self._get(name, 0, MAX_INDEX, progress)[0].decode(errors='replace')
            except RangeIgnored:
                pass
        return self._file(name)[0].read_text(errors='replace')

    def _ranged(self, name: str) -> RangedFile:
        progress, etags, sizes = Progress(f'{self.id}/{name}'), set(), []

        def fetch(begin: int, end: int) -> bytes:
            with self._errors(), closing(progress):
                data, size, etag = self._get(name, begin, end, progress)
            etags.add(etag)
            sizes.append(size)
            if len(etags) > 1 or len(set(sizes)) > 1:
                raise CheckpointError(f'{self.id}/{name} changed while it was read: run it again')
            return data

        return RangedFile(f'{self.id}/{name}', fetch, lambda: sizes[0])

    def _get(self, name: str, begin: int, end: int, progress: Progress) -> tuple[bytes, int | None, str | None]:
        """Bytes begin to end (exclusive) of a file, its size, and its etag.

        Raises:
            RangeIgnored: the whole file would come.
            CheckpointError: what comes is not what was asked for.
        """
        if self.offline:
            raise LocalEntryNotFoundError(f'{name} is not in the cache')
        url = huggingface_hub.hf_hub_url(self.id, name, revision=self.commit or self.revision,
                                         endpoint=self.endpoint)
        headers = {**build_hf_headers(token=self.token, library_name='timm_nonlocal'),
                   'Range': f'bytes={begin}-{end - 1}', 'Accept-Encoding': 'identity'}
        with _stream(url, headers, self.timeout) as (response, chunks):
            responses = [*response.history, response]
            if response.status_code == 416:
                raise CheckpointError(f'{self.id}/{name} has no bytes from {begin} on: it is empty or truncated')
            if response.status_code >= 400:
                getattr(response, 'read', lambda: None)()
                hf_raise_for_status(response)
            if response.status_code != 206:
                raise RangeIgnored
            commit = _header(responses, 'x-repo-commit')
            if self.commit and commit and commit != self.commit:
                raise CheckpointError(f'{self.id} went from commit {self.commit[:8]} to {commit[:8]} while it was '
                                      f'read: run it again')
            self.commit = self.commit or commit
            etag = _header(responses, 'x-linked-etag') or _header(responses, 'etag')
            given = re.fullmatch(r'bytes (\d+)-(\d+)/(\d+|\*)', response.headers.get('content-range', ''))
            if not given or int(given[1]) != begin or not begin <= int(given[2]) < end:
                raise CheckpointError(f'{self.id}/{name}: asked for bytes {begin} to {end - 1}, the server offers '
                                      f'{response.headers.get("content-range", "no range")[:80]!r}')
            size = None if given[3] == '*' else int(given[3])
            expected, data = int(given[2]) + 1 - begin, bytearray()
            for chunk in chunks:
                data += chunk
                progress.advance(len(chunk))
                if len(data) > expected:
                    break
        if len(data) != expected:
            raise CheckpointError(f'{self.id}/{name}: {expected} bytes were announced and '
                                  f'{"more" if len(data) > expected else len(data)} came')
        etag = etag.removeprefix('W/').strip('"') if etag else None
        if etag and re.fullmatch(r'[0-9a-f]{64}', etag):
            self.sha256 = etag
        return bytes(data), size, etag


@contextmanager
def _stream(url: str, headers: dict[str, str], timeout: float) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """A GET whose body is read piece by piece, through the Hub client's session, be it of httpx or of requests."""
    session: Any = get_session()
    if callable(getattr(session, 'stream', None)):  # httpx; in requests it is a flag
        with session.stream('GET', url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            yield response, response.iter_raw(1 << 16)
    else:
        with session.get(url, headers=headers, timeout=timeout, stream=True) as response:
            yield response, response.iter_content(1 << 16)


def _header(responses: list[Any], name: str) -> str | None:
    """A header from the first response of a redirected request that has it: the Hub's, before its storage's."""
    return next((response.headers[name] for response in responses if name in response.headers), None)


def _snapshot(path: Path) -> str | None:
    """The commit of a file in the Hub's cache, from its path."""
    folders = path.parts
    return folders[folders.index('snapshots') + 1] if 'snapshots' in folders else None
