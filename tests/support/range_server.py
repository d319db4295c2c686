"""A loopback server with the few answers that a range read from the Hub needs, and the ways in which it can go wrong.

Standard library only; it counts requests and the bytes of their bodies.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Optional
from urllib.parse import quote, unquote

COMMITS = ('a' * 40, 'b' * 40)


@dataclass
class Request:
    path: str
    range: Optional[str]
    authorization: Optional[str]
    status: int = 0
    sent: int = 0


@dataclass
class RangeServer:
    """One repository, user/repo, at one commit after the other.

    Attributes:
        files: name to path, per commit.
        refs: branches and the like beside main, to commits.
        ignore_range: answer 200 with the whole file.
        redirect: answer with a 302 to this server, the storage.
        move_after: from so many requests on main is the second commit.
        forget_commits: the storage has no commits: whatever is asked for, the newest file comes.
        refuse: a status to answer with, and its X-Error-Code.
        cut: bytes left out at the end of every body.
        shift: added to the start that Content-Range claims.
    """

    files: dict[str, dict[str, Path]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    ignore_range: bool = False
    redirect: Optional['RangeServer'] = None
    move_after: Optional[int] = None
    forget_commits: bool = False
    refuse: Optional[tuple[int, str]] = None
    cut: int = 0
    shift: int = 0
    address: str = ''
    requests: list[Request] = field(default_factory=list)

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.requests)

    def main(self) -> str:
        moved = self.move_after is not None and len(self.requests) > self.move_after
        return COMMITS[moved]


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    wbufsize = -1
    hub: RangeServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, headers: dict[str, Any], body: bytes = b'') -> None:
        self.hub.requests[-1].status = status
        self.send_response(status)
        for name, value in {'Content-Length': len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != 'HEAD':
            body = body[:len(body) - self.hub.cut]
            self.hub.requests[-1].sent += len(body)
            try:
                self.wfile.write(body)
                if self.hub.cut:
                    self.close_connection = True
            except OSError:
                self.close_connection = True

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append(Request(self.path, self.headers['Range'], self.headers['Authorization']))
        match = re.fullmatch(r'/user/(\w+)/resolve/([^/]+)/(.+)', self.path)
        if hub.refuse:
            return self.answer(hub.refuse[0], {'X-Error-Code': hub.refuse[1]})
        if not match or match[1] != 'repo':
            return self.answer(404, {'X-Error-Code': 'RepoNotFound'})
        revision = unquote(match[2])
        commit = hub.main() if revision == 'main' or hub.forget_commits else hub.refs.get(revision, revision)
        if commit not in hub.files:
            return self.answer(404, {'X-Error-Code': 'RevisionNotFound'})
        if match[3] not in hub.files[commit]:
            return self.answer(404, {'X-Error-Code': 'EntryNotFound', 'X-Repo-Commit': commit})
        if hub.redirect:
            return self.answer(302, {'Location': f'{hub.redirect.address}/user/repo/resolve/{commit}/{match[3]}',
                                     'X-Repo-Commit': commit, 'X-Linked-Etag': f'"{commit[0] * 64}"',
                                     'X-Linked-Size': hub.files[commit][match[3]].stat().st_size})
        etag = commit[0] * 64 if match[3] == 'model.safetensors' else f'{match[3]} of {commit}'  # the cache's key
        self.send_file(hub.files[commit][match[3]], {'X-Repo-Commit': commit, 'ETag': f'"{quote(etag, "")}"',
                                                     'Accept-Ranges': 'bytes'})

    def send_file(self, path: Path, headers: dict[str, Any]) -> None:
        size, hub = path.stat().st_size, self.hub
        asked = re.fullmatch(r'bytes=(\d+)-(\d+)', self.headers['Range'] or '')
        if not asked or hub.ignore_range:
            return self.answer(200, headers, path.read_bytes())
        begin, end = int(asked[1]), min(int(asked[2]) + 1, size)
        if begin >= size:
            return self.answer(416, {**headers, 'Content-Range': f'bytes */{size}'})
        with open(path, 'rb') as file:
            file.seek(begin)
            body = file.read(end - begin)
        self.answer(206, {**headers, 'Content-Range': f'bytes {begin + hub.shift}-{end + hub.shift - 1}/{size}'}, body)


@contextmanager
def serving(**options: Any) -> Iterator[RangeServer]:
    """A `RangeServer` on 127.0.0.1, at a port of its own."""
    hub = RangeServer(**options)
    server = ThreadingHTTPServer(('127.0.0.1', 0), type('Bound', (Handler,), {'hub': hub}))
    server.daemon_threads = True
    hub.address = f'http://127.0.0.1:{server.server_address[1]}'
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def pad(path: Path, size: int) -> None:
    """Appends a tensor of zeros to a safetensors file, to about that size, without writing the zeros."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], 'little')
    header, body = json.loads(data[8:8 + length]), data[8 + length:]
    filler = size - len(body)
    header['filler'] = {'dtype': 'U8', 'shape': [filler], 'data_offsets': [len(body), size]}
    text = json.dumps(header).encode()
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text + body)
        file.truncate(8 + len(text) + size)
