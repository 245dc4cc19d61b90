"""/metrics, /livez and /readyz over HTTP, on threads of their own: busy streams cannot starve them."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from nearkin_service.listening import split_host_port

log = logging.getLogger("nearkin.http")

Check = Callable[[], str]
"""Returns "" when all is well, or what is not."""
_TEXT = "text/plain; charset=utf-8"
_SECONDS_PER_REQUEST = 10
_MOST_CONNECTIONS = 64
_EVICTION_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    content_type: str
    body: bytes


Answer = Callable[[str], Reply]
_NO_TOKEN = Reply(401, _TEXT, b"a token of scope read that reaches all runs is needed\n")


class _BoundedServer(ThreadingHTTPServer):
    """A thread for each connection, but never more than a few: the oldest makes room for who comes then.

    However many connections sit idle, a probe is answered at once.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[BaseHTTPRequestHandler],
        tls: ssl.SSLContext | None,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._places = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._open: dict[Any, socket.socket] = {}  # as accepted -> as spoken to; the oldest first
        self._opening = threading.Lock()
        self._tls = tls
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self._evict()
            while not self._places.acquire(timeout=_EVICTION_SECONDS):
                self._evict()
        self._speak_through(request, request)
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._leave(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        spoken = request
        try:
            request.settimeout(_SECONDS_PER_REQUEST)
            if self._tls is not None:  # on the connection's own thread: a silent peer stalls nobody else
                spoken = self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
                self._speak_through(request, spoken)
                spoken.do_handshake()
            super().process_request_thread(spoken, client_address)
        except (OSError, ValueError) as error:  # a socket that was evicted meanwhile, or a peer's nonsense
            log.debug("a connection came to nothing: %s", error)
            self.shutdown_request(spoken)
        finally:
            self._leave(request)

    def _speak_through(self, request: Any, connection: socket.socket) -> None:
        with self._opening:
            self._open[request] = connection

    def _evict(self) -> None:
        """Ends the oldest connection; its thread notices, and gives its place back."""
        with self._opening:
            oldest = self._open.pop(next(iter(self._open), None), None)
        if oldest is not None:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)

    def _leave(self, request: Any) -> None:
        with self._opening:
            self._open.pop(request, None)
        self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a connection failed", exc_info=True)


class HealthServer:
    """Serves until `close`. OSError: the address is taken."""

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        *,
        live: Check,
        ready: Check,
        may_read: Callable[[str], bool],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`may_read(token)`: whether the metrics may be shown to who has this token ("": none)."""
        answers: Mapping[str, Answer] = {
            "/metrics": lambda token: (
                Reply(200, CONTENT_TYPE_LATEST, generate_latest(registry)) if may_read(token) else _NO_TOKEN
            ),
            "/livez": lambda _: _health(live()),
            "/readyz": lambda _: _health(live() or ready()),
        }
        self._server = _BoundedServer(split_host_port(address), _handler(answers), tls)
        self.address = "{}:{}".format(*self._server.server_address[:2])
        self._thread = threading.Thread(target=self._server.serve_forever, name="nearkin-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _bearer(authorization: str) -> str:
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _health(trouble: str) -> Reply:
    return Reply(503 if trouble else 200, _TEXT, f"{trouble or 'ok'}\n".encode())


def _handler(answers: Mapping[str, Answer]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _SECONDS_PER_REQUEST

        def do_GET(self) -> None:
            answer = answers.get(self.path.partition("?")[0])
            reply = (
                answer(_bearer(self.headers.get("Authorization", "")))
                if answer
                else Reply(404, _TEXT, b"/metrics /livez /readyz\n")
            )
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            log.debug(format, *args)

    return Handler
