"""Anything at all sent to the port: HTTP/2 that is none, calls that are none, messages of impossible lengths.

NEARKIN_PORT_EXAMPLES=20000 pytest -m soak tests/service/test_port.py
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nearkin.v1 import neighbours_pb2 as pb

from tests.service.conftest import Caller, Serving, brute_force, random_rows

Serve = Callable[..., Serving]
EXAMPLES = int(os.environ.get("NEARKIN_PORT_EXAMPLES", "5000"))
ROWS = random_rows(40, 6)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHODS = [method.name for method in pb.DESCRIPTOR.services_by_name["NeighbourService"].methods]
PATHS = [f"/nearkin.v1.NeighbourService/{name}" for name in METHODS] + [
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/nearkin.v1.NeighbourService/..",
    "/",
    "",
]

DATA, HEADERS, SETTINGS, WINDOW = 0, 1, 4, 8
lengths = st.sampled_from([0, 1, 4, 65_535, 2**24 - 1, 2**31, 2**32 - 1])
numbers = st.sampled_from([0, 1, -1, 2**31 - 1, 2**63 - 1, -(2**63)])


def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    """An HTTP/2 frame; `length`: what it says of itself, if that is not so."""
    said = len(payload) if length is None else length
    return (
        (said & 0xFFFFFF).to_bytes(3, "big")
        + bytes([kind & 255, flags & 255])
        + struct.pack(">I", stream & 0xFFFFFFFF)
        + payload
    )


def headers(path: str, **more: str) -> bytes:
    """A HPACK block of plain literals."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        "te": "trailers",
        "content-type": "application/grpc",
    } | more
    return b"".join(
        b"\0" + b"".join(bytes([len(part)]) + part for part in (name.encode()[:126], value.encode()[:126]))
        for name, value in fields.items()
    )


def message(payload: bytes, length: int | None = None, compressed: int = 0) -> bytes:
    """As gRPC puts it into DATA frames; `length` as above."""
    return bytes([compressed]) + struct.pack(">I", len(payload) if length is None else length) + payload


pushes = st.builds(
    lambda classes, width, k, epoch: pb.BeginPushRequest(
        run="port", num_classes=classes, row_shape=[width], k=max(min(k, 2**31 - 1), -(2**31)), epoch=epoch
    ).SerializeToString(),
    numbers,
    numbers,
    numbers,
    numbers,
)
rows = st.builds(
    lambda start, push, payload: pb.WriteRowsRequest(
        push_id=push, row_start=start, payload=payload
    ).SerializeToString(),
    numbers,
    st.text(max_size=30),
    st.binary(max_size=40),
)
payloads = st.binary(max_size=60) | pushes | rows
calls = st.builds(
    lambda path, payload, length, compressed, stream, end: (
        frame(HEADERS, 4, stream, headers(path))
        + frame(DATA, end, stream, message(payload, length, compressed))
    ),
    st.sampled_from(PATHS),
    payloads,
    st.none() | lengths,
    st.sampled_from([0, 0, 0, 1, 255]),
    st.sampled_from([1, 3, 5, 0, 2]),
    st.sampled_from([0, 1]),
)
frames = st.builds(
    frame,
    st.integers(0, 12),
    st.integers(0, 255),
    st.sampled_from([0, 1, 2, 2**31 - 1, 2**31]),
    st.binary(max_size=60),
    st.none() | lengths,
)
opening = st.sampled_from(
    [
        PREFACE + frame(SETTINGS, 0, 0, b""),
        PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)) + frame(WINDOW, 0, 0, b"\x7f\xff\xff\xff"),
        PREFACE,
        PREFACE[:10],
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"",
    ]
)
conversations = st.tuples(opening, st.lists(calls | frames | st.binary(max_size=100), max_size=6)).map(
    lambda parts: parts[0] + b"".join(parts[1])
)


def say(address: str, data: bytes) -> None:
    """Sends it and looks at what comes back, if it comes at once."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection, suppress(OSError):
        connection.sendall(data)
        connection.settimeout(0.005)
        while connection.recv(65_536):
            pass


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def talk_nonsense(serve: Serve, folder: Path, examples: int) -> None:
    ready = folder / "ready"
    serving = serve("--listen", "127.0.0.1:0", "--engine", "flat", "--ready-file", str(ready))
    address = ready.read_text().split()[1]
    caller: Any = Caller(address)
    caller.push(ROWS)
    before = resident(serving.process.pid)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=conversations)
    def go_on(data: bytes) -> None:
        say(address, data)
        assert serving.process.poll() is None

    go_on()
    caller.push(ROWS + 1, epoch=1)
    np.testing.assert_array_equal(caller.table(generation=2).ids, brute_force(ROWS + 1, 5))
    assert [run.run for run in caller.stub.ListRuns(pb.ListRunsRequest(), timeout=30).runs] == ["run"]
    assert resident(serving.process.pid) < before + (64 << 20)
    caller.channel.close()
    assert b"Traceback" not in serving.log.read_bytes()  # gRPC quotes what it was sent


def test_nonsense_on_the_port(serve: Serve, tmp_path: Path) -> None:
    talk_nonsense(serve, tmp_path, 150)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_much_nonsense_on_the_port(serve: Serve, tmp_path: Path) -> None:
    talk_nonsense(serve, tmp_path, EXAMPLES)
