"""/metrics, /livez and /readyz over HTTP, on threads of their own: busy streams cannot starve them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from nearkin_service.listening import split_host_port

log = logging.getLogger("nearkin.http")

Check = Callable[[], str]
"""Returns "" when all is well, or what is not."""
_TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    content_type: str
    body: bytes


class HealthServer:
    """Serves until `close`. OSError: the address is taken."""

    def __init__(self, address: str, registry: CollectorRegistry, *, live: Check, ready: Check) -> None:
        answers = {
            "/metrics": lambda: Reply(200, CONTENT_TYPE_LATEST, generate_latest(registry)),
            "/livez": lambda: _health(live()),
            "/readyz": lambda: _health(live() or ready()),
        }
        self._server = ThreadingHTTPServer(split_host_port(address), _handler(answers))
        self._server.daemon_threads = True
        self.address = "{}:{}".format(*self._server.server_address[:2])
        self._thread = threading.Thread(target=self._server.serve_forever, name="nearkin-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _health(trouble: str) -> Reply:
    return Reply(503 if trouble else 200, _TEXT, f"{trouble or 'ok'}\n".encode())


def _handler(answers: Mapping[str, Callable[[], Reply]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            answer = answers.get(self.path.partition("?")[0])
            reply = answer() if answer else Reply(404, _TEXT, b"/metrics /livez /readyz\n")
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            log.debug(format, *args)

    return Handler
