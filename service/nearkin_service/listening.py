"""Addresses to listen on: unix sockets and loopback freely, anything else only if it asks who comes."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from nearkin.v1.frames import BULK_SUFFIX

log = logging.getLogger("nearkin.service")

_MAX_SOCKET_PATH = 107
_SOCKET_MASK = 0o177
_BACKLOG = 128


def is_unix(address: str) -> bool:
    return address.startswith("unix:")


def socket_path(address: str) -> Path:
    """Of `unix:///absolute/path` or `unix:path`."""
    path = address.removeprefix("unix:")
    return Path("/" + path.lstrip("/") if path.startswith("//") else path).absolute()


def split_host_port(address: str) -> tuple[str, int]:
    """ValueError: not `host:port`."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is neither unix:///path nor host:port (port 0: any free one)")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Doors:
    """What stands between an address and a stranger."""

    tls: bool = False
    client_certificates: bool = False
    tokens: bool = False
    insecure: bool = False

    @property
    def guarded(self) -> bool:
        """Whether a stranger is turned away, and a token cannot be overheard."""
        return self.client_certificates or (self.tls and self.tokens)


def check_address(address: str, doors: Doors) -> None:
    """ValueError: malformed, or open to others although nobody said that it may be."""
    if is_unix(address):
        path = socket_path(address)
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            raise ValueError(
                f"{address}: a socket's path has at most {_MAX_SOCKET_PATH} bytes; choose a shorter one"
            )
        return
    host, _ = split_host_port(address)
    if is_loopback(host) or doors.guarded:
        return
    lacking = (
        "tokens would cross the network in clear text" if doors.tokens else "nothing is asked of callers"
    )
    if not doors.insecure:
        raise ValueError(
            f"{address} can be reached from other machines and {lacking}; listen on a unix socket or "
            "127.0.0.1, give --tls-certificate and --tls-key with tokens (`nearkin-serve token create`) or "
            "with --tls-client-ca, or pass --insecure if the network is trusted"
        )
    log.warning("%s can be reached from other machines, and %s (--insecure)", address, lacking)


def bind(
    server: grpc.aio.Server | grpc.Server, address: str, credentials: grpc.ServerCredentials | None
) -> str:
    """Listens, with TLS if there are credentials and it is no unix socket.

    Returns the address with the port that it became. ValueError: it is taken.
    """
    if is_unix(address):
        return _bind_unix(server, socket_path(address))
    host, _ = split_host_port(address)
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ValueError(f"cannot listen on {address}: {error}") from error
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind_unix(server: grpc.aio.Server | grpc.Server, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    _make_way(path)
    try:
        with _umask(_SOCKET_MASK):
            server.add_insecure_port(f"unix:{path}")
    except RuntimeError as error:
        raise ValueError(f"cannot listen on unix://{path}: {error}") from error
    return f"unix://{path}"


def bulk_path(address: str) -> Path:
    """Where the bulk lane of a unix address is."""
    path = socket_path(address)
    return path.with_name(path.name + BULK_SUFFIX)


def bulk_socket(address: str) -> socket.socket:
    """Listens beside a unix address. ValueError: that cannot be done."""
    path = bulk_path(address)
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise ValueError(f"{path} has more than {_MAX_SOCKET_PATH} bytes; choose a shorter path")
    _make_way(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        with _umask(_SOCKET_MASK):
            listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on {path}: {error.strerror}") from error
    return listener


def local_socket() -> tuple[socket.socket, str]:
    """Listens in Linux's abstract namespace, which leaves no file, under a random name. OSError."""
    name = f"nearkin-{secrets.token_hex(16)}"
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(f"\0{name}")
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener, name


def bulk_port(address: str, port: int) -> socket.socket:
    """Listens on a port of the host of `address`; 0: any free one. ValueError: it is taken."""
    host, _ = split_host_port(address)
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        both = family == socket.AF_INET6 and host == "::"
        return socket.create_server(place[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise ValueError(f"--bulk-port {port}: cannot listen beside {address}: {error.strerror}") from error


def _make_way(path: Path) -> None:
    """Removes the socket of a service that is gone. ValueError: one is alive, or it is no socket."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ValueError(f"{path} exists and is not a socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            log.info("%s was left by a service that is gone; replaced", path)
            path.unlink()
            return
    raise ValueError(f"another service listens on {path}; stop it or choose another path")


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    """The socket is private from its first moment."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
