"""The two servers: HTTP itself, the log of requests, and faults made to order."""

import json
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from . import api
from .store import Account, Refused, Store
from .xet import XetStorage


class Request(NamedTuple):
    """One line of the log. `server` is 'hub' or 'cdn'."""

    server: str
    method: str
    path: str
    range: str | None
    authorized: bool
    status: int


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of a method whose path matches.

    `cut` closes the connection after so many bytes of the answer's body, or of the request's where it has one. `mute`
    does what was asked and closes the connection without an answer. Otherwise the answer is `status`.
    """

    method: str
    path: str
    status: int = 503
    times: int = 1
    cut: int | None = None
    mute: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    message: str = 'made to fail'

    def take(self, method: str, path: str) -> bool:
        if self.times > 0 and method == self.method and re.search(self.path, path):
            self.times -= 1
            return True
        return False


class Answer(NamedTuple):
    """A status, a body (JSON unless bytes) and headers."""

    status: int = 200
    body: Any = b''
    headers: Mapping[str, str] = MappingProxyType({})


class HubDouble:
    """The servers, running from `with` to its end.

    Args:
        xet: announce Xet storage for large files; otherwise they go by LFS.
    """

    def __init__(self, xet: bool = False) -> None:
        self.store, self.xet = Store(), XetStorage() if xet else None
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.bugs: list[Exception] = []
        self.ignores_ranges = False

    def __enter__(self) -> 'HubDouble':
        self._servers = {name: self._serve(name) for name in ('hub', 'cdn')}
        self.url, self.cdn_url = (f'http://{host}:{server.server_port}' for host, server in
                                  zip(('127.0.0.1', 'localhost'), self._servers.values(), strict=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()
        if self.xet:
            self.xet.close()
        if self.bugs:
            raise RuntimeError('the double broke down') from self.bugs[0]

    def _serve(self, name: str) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (_Handler,), {'hub': self, 'server_name': name}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return server

    def add_account(self, name: str, token: str, role: str = 'write', organizations: tuple[str, ...] = ()) -> None:
        self.store.accounts[token] = Account(name, role, organizations)

    def fail(self, method: str, path: str, **fault: Any) -> Fault:
        self.faults.append(Fault(method, path, **fault))
        return self.faults[-1]

    def reset(self) -> None:
        """Forgets the log and the faults; what was uploaded stays."""
        self.log.clear()
        self.faults.clear()
        self.ignores_ranges = False

    def requests(self, method: str, path: str = '', server: str | None = None) -> list[Request]:
        """The log's lines of a method whose path matches."""
        return [line for line in self.log
                if line.method == method and re.search(path, line.path) and server in (None, line.server)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    wbufsize = -1  # one packet for headers and body: unbuffered, Nagle's algorithm adds 40 ms
    hub: HubDouble
    server_name: str

    def log_message(self, *arguments: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do(self) -> None:
        fault = next((fault for fault in self.hub.faults if fault.take(self.command, self.path)), None)
        cut = fault.cut if fault else None
        if cut is not None and self.command in ('PUT', 'POST'):
            self.rfile.read(cut)
            return self._hang_up(0)
        body = self._body()
        if fault and fault.mute:
            self._answer(body)
            return self._hang_up(0)
        if fault and cut is None:
            answer = self._error(Refused(fault.status, fault.message, headers=fault.headers))
        else:
            answer = self._answer(body)
        data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {'Content-Length': str(len(data)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self._log(answer.status)
        if self.command == 'HEAD':
            return None
        if cut is not None:
            self.wfile.write(data[:cut])
            return self._hang_up(answer.status)
        self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def _hang_up(self, status: int) -> None:
        """Closes the connection where it stands."""
        if not status:
            self._log(status)
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _log(self, status: int) -> None:
        self.hub.log.append(Request(self.server_name, self.command, self.path, self.headers.get('Range'),
                                    'Authorization' in self.headers, status))

    def _body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(chunks)

    def _answer(self, body: bytes) -> Answer:
        url = urlsplit(self.path)
        try:
            call = api.Call(self.hub, self.command, url.path, parse_qs(url.query), body, self._account())
            with self.hub.store.lock:
                answer = Answer(*api.answer(call, self.server_name))
            return self._ranged(answer)
        except Refused as error:
            return self._error(error)
        except Exception as bug:
            self.hub.bugs.append(bug)
            return self._error(Refused(500, f'the double is broken: {bug!r}'))

    def _account(self) -> Account | None:
        token = self.headers.get('Authorization')
        if token is None:
            return None
        if self.server_name == 'cdn':
            raise Refused(400, 'Only one auth mechanism allowed: the Hub’s token must not reach its storage')
        account = self.hub.store.accounts.get(token.removeprefix('Bearer '))
        if account is None:
            raise Refused(401, 'Invalid credentials in Authorization header')
        return account

    def _ranged(self, answer: Answer) -> Answer:
        wish = re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range') or '')
        if answer.status != 200 or self.hub.ignores_ranges or not wish or 'Accept-Ranges' not in answer.headers:
            return answer
        size = len(answer.body)
        first, last = int(wish[1]), min(int(wish[2] or size), size - 1)
        if first > last:
            return Answer(416, b'', {'Content-Range': f'bytes */{size}'})
        return Answer(206, answer.body[first:last + 1],
                      {**answer.headers, 'Content-Range': f'bytes {first}-{last}/{size}'})

    @staticmethod
    def _error(error: Refused) -> Answer:
        headers = {'Content-Type': 'application/json', 'X-Error-Message': str(error).encode('ascii', 'ignore').decode()}
        if error.code:
            headers['X-Error-Code'] = error.code
        return Answer(error.status, error.body, {**headers, **error.headers})

