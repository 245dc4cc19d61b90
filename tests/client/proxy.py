"""A TCP proxy that cuts connections after so many bytes."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class CuttingProxy:
    """Passes bytes on to an address; cuts the connection whenever `cut_after` more bytes went up.

    Attributes:
        address: where to connect.
        cuts_left: how many more cuts there will be.
        bytes_up: bytes passed on to the service so far.
    """

    def __init__(self, target: str, cut_after: int, cuts: int, deaf: bool = False) -> None:
        self._deaf = deaf
        self._closed = threading.Event()
        self._target = target
        self._cut_after = cut_after
        self.cuts_left = cuts
        self.bytes_up = 0
        self._since_cut = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._join(self._listener.accept()[0])

    def _join(self, down: socket.socket) -> None:
        try:
            up = _connected(self._target)
        except OSError:
            down.close()
            return
        for source, sink in ((down, up), (up, down)):
            threading.Thread(target=self._pass, args=(source, sink, source is down), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, upwards: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
                if upwards and self._cut_now(len(data)):
                    if self._deaf:
                        self._closed.wait()  # both ends stay open, and nothing moves any more
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                end.close()

    def _cut_now(self, count: int) -> bool:
        with self._lock:
            self.bytes_up += count
            self._since_cut += count
            if self.cuts_left == 0 or self._since_cut < self._cut_after:
                return False
            self.cuts_left -= 1
            self._since_cut = 0
            return True


def _connected(target: str) -> socket.socket:
    if not target.startswith("unix://"):
        host, _, port = target.rpartition(":")
        return socket.create_connection((host, int(port)))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(target.removeprefix("unix://"))
    return connection


@contextlib.contextmanager
def cutting_proxy(target: str, cut_after: int, cuts: int, deaf: bool = False) -> Iterator[CuttingProxy]:
    """`deaf`: instead of closing a connection it keeps it open and takes nothing more."""
    proxy = CuttingProxy(target, cut_after, cuts, deaf)
    try:
        yield proxy
    finally:
        proxy.close()
