"""The doors of the bulk lane: where it begins for who dialled an address, and who is behind it."""

from __future__ import annotations

import hmac
import socket
import stat

from google.protobuf.message import DecodeError
from nearkin.v1 import frames
from nearkin.v1 import neighbours_pb2 as pb

from nearkin_client.channel import Endpoint, socket_path

CONNECT_SECONDS = 2.0
_BUFFER_BYTES = 1 << 20
Address = str | tuple[str, int]
"""The path of a unix socket, or its name behind a zero byte; or a host and a port."""


class NoLane(Exception):  # noqa: N818 - nothing is wrong: gRPC is used instead
    """Why this goes through gRPC."""


def elsewhere(offer: pb.BulkLane, endpoint: Endpoint) -> str:
    """Why the service cannot be shown to be on this host; "" where it is, for certain."""
    if endpoint.is_local:
        return ""
    if not offer.HasField("local"):
        return "it sees us on another host, or offers nobody proof (--bulk-port off, an older version)"
    port = int(endpoint.address.rpartition(":")[2])
    if port not in offer.local.service_ports:
        return f"port {port} is not the service's own: something stands between"
    return _why_unproven(offer)


def _why_unproven(offer: pb.BulkLane) -> str:
    """Why nobody at the local door gives the service's answer; "" where it does."""
    place = f"its socket @{offer.local.name}"
    try:
        connection = connect(f"\0{offer.local.name}")
    except ConnectionRefusedError:
        return (
            f"{place} is not here: another host, a network namespace of its own, or a service that just ended"
        )
    except OSError as error:
        return f"{place} cannot be reached: {error.strerror or error}"
    try:
        with connection:
            if answered(connection, offer.ticket, offer.answer, only_answer=True):
                return ""
    except (OSError, frames.Ended, frames.Malformed, DecodeError) as error:
        return f"{place} does not let us in ({str(error) or type(error).__name__})"
    return f"{place} is not the service's"


def answered(connection: socket.socket, ticket: bytes, answer: bytes, *, only_answer: bool = False) -> bool:
    """Whether the service itself is at the other end, which is shown the ticket."""
    frames.limit_silence(connection, CONNECT_SECONDS)
    frames.send(connection, pb.BulkHello(ticket=ticket, only_answer=only_answer).SerializeToString())
    return hmac.compare_digest(reply(connection).answer, answer)


def door(offer: pb.BulkLane, endpoint: Endpoint) -> Address:
    """Where the lane of an offer begins. NoLane: nowhere for us."""
    path = socket_path(endpoint.address)
    if path is not None:
        beside = path.with_name(path.name + frames.BULK_SUFFIX)
        try:
            if stat.S_ISSOCK(beside.stat().st_mode):
                return str(beside)
        except OSError as error:
            raise NoLane(f"{beside}: {error.strerror}") from error
        raise NoLane(f"{beside} is no socket")
    if not elsewhere(offer, endpoint):
        return f"\0{offer.local.name}"
    host, _, port = endpoint.address.rpartition(":")
    if endpoint.tls is not None:
        raise NoLane("the bulk lane has no TLS")
    for each in offer.doors:
        if each.service_port == int(port):
            return host.strip("[]"), each.port
    raise NoLane(f"port {port} is not the service's own: something stands between")


def connect(address: Address) -> socket.socket:
    """OSError: nobody is there within CONNECT_SECONDS."""
    if isinstance(address, tuple):
        connection = socket.create_connection(address, CONNECT_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    else:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(CONNECT_SECONDS)
        try:
            connection.connect(address)
        except OSError:
            connection.close()
            raise
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    connection.setblocking(True)
    return connection


def reply(connection: socket.socket) -> pb.BulkReply:
    """The next message of a few bytes. OSError, Ended, Malformed, DecodeError."""
    data = frames.receive(connection)
    if data is None:
        raise frames.Ended("the service closed the connection")
    return pb.BulkReply.FromString(data)
