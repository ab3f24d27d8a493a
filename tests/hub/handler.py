"""HTTP on the wire: reads a request, lets the endpoints answer, applies the fault in force, logs what was sent."""

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from . import pushing, reading  # noqa: F401  (importing them registers their endpoints)
from .access import HubError, User
from .faults import Fault, Faults
from .routing import Call, Reply, dispatch
from .store import Store


REPO_IN_PATH = re.compile(r"/(?:api/models/)?(?P<repo_id>(?!api/)[^/]+/[^/]+?)(?:\.git/|/|$)")
TRICKLE_SECONDS = 0.05
SETTLE_SECONDS = 2.0


@dataclass(frozen=True)
class Request:
    """A request as the server saw it: status 0 where the connection was cut before, and the bytes of body sent."""

    method: str
    path: str
    status: int
    sent: int
    range: str | None = None

    @property
    def repo_id(self) -> str | None:
        """Repository the request is about, if any."""
        match = REPO_IN_PATH.match(urlsplit(self.path).path)
        return unquote(match["repo_id"]) if match else None

    @property
    def is_download(self) -> bool:
        """Whether the request fetched a file or a part of one."""
        return self.method == "GET" and "/resolve/" in self.path


class RequestLog:
    """Requests in the order of their completion."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._entries: list[Request] = []

    @contextmanager
    def running(self) -> Iterator[list[Request]]:
        """Count a request as under way until the block ends; what is put in the list is logged then."""
        finished: list[Request] = []
        with self._changed:
            self._running += 1
        try:
            yield finished
        finally:
            with self._changed:
                self._running -= 1
                self._entries += finished
                self._changed.notify_all()

    def entries(self) -> list[Request]:
        """Everything logged, after waiting briefly for requests under way: a client may be done before its server."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0, timeout=SETTLE_SECONDS)
            return list(self._entries)

    def clear(self) -> None:
        """Forget everything logged."""
        self.entries()
        with self._changed:
            self._entries.clear()


@dataclass
class State:
    """What the handlers of one server share."""

    store: Store = field(default_factory=Store)
    faults: Faults = field(default_factory=Faults)
    log: RequestLog = field(default_factory=RequestLog)
    lock: threading.RLock = field(default_factory=threading.RLock)


class Listener(ThreadingHTTPServer):
    """A listening port that, once closed, leaves no connection of it open."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, state: State) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.state = state
        self._connections: set[socket.socket] = set()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: socket.socket) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        """Show what went wrong in an endpoint, not that a client hung up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def close(self) -> None:
        """Stop listening and drop every open connection."""
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with suppress(OSError):  # the client was faster
                connection.shutdown(socket.SHUT_RDWR)


class Handler(BaseHTTPRequestHandler):
    """One connection, with any number of requests on it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test output clean; `RequestLog` has it all."""

    def answer(self) -> None:
        state = self.server.state
        with state.log.running() as finished:
            body = self.read_body()
            user = state.store.users.get(self.bearer_token())
            fault = state.faults.take(self.command, self.path)
            time.sleep(fault.delay)
            status, sent = 0, 0
            if fault.cut:
                self.hang_up()
            else:
                reply = self.reply_to(body, user, fault)
                status, sent = reply.status, self.send(reply, fault)
            finished.append(Request(self.command, self.path, status, sent, self.headers["Range"]))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815  (names that http.server looks up)

    def bearer_token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply_to(self, body: bytes, user: User | None, fault: Fault) -> Reply:
        """The endpoint's reply, or the refusal of the Hub or the fault in its place."""
        try:
            if fault.status is not None:
                raise HubError(fault.status, fault.message, fault.code)
            if self.bearer_token() and user is None:
                raise HubError(401, "Invalid credentials in Authorization header")
            with self.server.state.lock:
                reply = dispatch(self.server.state.store, self.call(body, user))
        except HubError as error:
            reply = Reply.of_error(error)
        except (KeyError, ValueError) as error:
            reply = Reply.of_error(HubError(400, f"Malformed request: {error!r}"))
        return replace(reply, body=fault.spoil(reply.body), headers={**reply.headers, **fault.headers})

    def call(self, body: bytes, user: User | None) -> Call:
        url = urlsplit(self.path)
        origin = f"http://127.0.0.1:{self.server.server_port}"
        return Call(self.command, url.path, parse_qs(url.query), self.headers, body, user, origin)

    def send(self, reply: Reply, fault: Fault) -> int:
        """Write a reply and return how many bytes of its body went out."""
        body = b"" if self.command == "HEAD" else reply.body[: fault.cut_after]
        sent = 0
        with suppress(
            BrokenPipeError, ConnectionResetError
        ):  # a client may leave early; the log tells how much it got
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            for piece in self.pieces(body, fault.bytes_per_second):
                self.wfile.write(piece)
                sent += len(piece)
        if len(body) < len(reply.body) and self.command != "HEAD":
            self.hang_up()
        return sent

    @staticmethod
    def pieces(body: bytes, bytes_per_second: float | None) -> Iterator[bytes]:
        if bytes_per_second is None:
            yield body
            return
        size = max(1, int(bytes_per_second * TRICKLE_SECONDS))
        for start in range(0, len(body), size):
            yield body[start : start + size]
            time.sleep(size / bytes_per_second)

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):  # the client was faster
            self.connection.shutdown(socket.SHUT_RDWR)
