"""Messages of the bulk lane on a socket: each behind its length as a varint, bulk bytes read and written in place.

The sockets block; `limit_silence` says for how long. What takes longer raises BlockingIOError.
"""

from __future__ import annotations

import socket
import struct

from nearkin.v1.bulk import Buffer, varint

BULK_SUFFIX = ".bulk"
"""What the lane's path has more than that of the service's unix socket."""
MOST_PREFIX_BYTES = 10
MOST_SMALL_BYTES = 64 << 10
"""Of a message without bulk bytes: a greeting, an answer, an error."""


class Malformed(Exception):
    """The peer does not speak this protocol."""


class Ended(Exception):
    """The peer ended in the middle of a message."""


def limit_silence(connection: socket.socket, seconds: float) -> None:
    """How long a single read or write may wait until anything moves; more than 0."""
    whole, part = divmod(max(seconds, 0.001), 1)
    limit = struct.pack("ll", int(whole), int(part * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def send(connection: socket.socket, head: Buffer, bulk: Buffer = b"") -> None:
    """One message, of which `bulk` is the end; nothing is copied together."""
    parts = [memoryview(varint(len(head) + len(bulk))), memoryview(head), memoryview(bulk)]
    while parts:
        sent = connection.sendmsg(parts)
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][sent:]


def send_head(connection: socket.socket, head: bytes, bulk_bytes: int) -> None:
    """The beginning of a message whose last bytes, so many, have to follow by themselves."""
    rest = memoryview(varint(len(head) + bulk_bytes) + head)
    while rest:
        rest = rest[connection.send(rest, socket.MSG_MORE) :]


def receive_length(connection: socket.socket) -> int | None:
    """The length of the next message; None where the peer has ended its direction. Malformed, Ended."""
    value = 0
    for place in range(MOST_PREFIX_BYTES):
        byte = connection.recv(1)
        if not byte:
            if place:
                raise Ended("ended within the length of a message")
            return None
        value |= (byte[0] & 0x7F) << (7 * place)
        if byte[0] < 0x80:
            return value
    raise Malformed("the length of a message is no varint")


def fill(connection: socket.socket, place: memoryview) -> None:
    """Receives as many bytes as the place holds. Ended: there are fewer."""
    done = 0
    while done < len(place):
        got = connection.recv_into(place[done:], 0, socket.MSG_WAITALL)
        if not got:
            raise Ended(f"ended {len(place) - done} bytes before the end of a message")
        done += got


def peek(connection: socket.socket, most: int) -> memoryview:
    """The next bytes, which stay to be received: as many, or fewer, as happen to be there. Ended: none come."""
    start = connection.recv(most, socket.MSG_PEEK)
    if not start:
        raise Ended("ended before a message")
    return memoryview(start)


def receive(connection: socket.socket, most: int = MOST_SMALL_BYTES) -> bytes | None:
    """A message of a few bytes; None where the peer has ended. Malformed: it is longer. Ended."""
    length = receive_length(connection)
    if length is None:
        return None
    if length > most:
        raise Malformed(f"a message of {length} bytes where at most {most} are expected")
    data = bytearray(length)
    fill(connection, memoryview(data))
    return bytes(data)
