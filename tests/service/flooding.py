"""Callers that send large messages as fast as they can, in processes of their own, and who asks for health.

    python -m tests.service.flooding ADDRESS KIND COUNT BYTES      # so many calls at the same time

The bytes are made before the first call: what is measured is what they cost the service.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nearkin.v1 import neighbours_pb2 as pb

from tests.service.conftest import ANY_LENGTH, code_of

MIB = 1 << 20
PATH = "/nearkin.v1.NeighbourService/"
CLASSES = 100_000_000
CALL_SECONDS = 300.0


def field_of(number: int, payload: bytes) -> bytes:
    """A length-delimited field."""
    length, prefix = len(payload), bytearray([number << 3 | 2])
    while length > 0x7F:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*prefix, length]) + payload


def begin(absent: bytes, num_classes: int = CLASSES) -> bytes:
    head = pb.BeginPushRequest(
        run="flooded", epoch=0, num_classes=num_classes, row_shape=[1], dtype=pb.DTYPE_FLOAT16, k=1
    )
    return head.SerializeToString() + field_of(10, absent)


def varints(first: int, count: int, step: int = 1) -> bytes:
    """Ids of four bytes each, as protobuf packs them."""
    ids = np.arange(first, first + count * step, step, dtype=np.int64)
    assert 1 << 21 <= ids[0] <= ids[-1] < 1 << 28
    pieces = [(ids >> 7 * place & 0x7F | (0x80 if place < 3 else 0)).astype(np.uint8) for place in range(4)]
    return np.stack(pieces, axis=1).tobytes()


def nearest(query: bytes) -> bytes:
    return pb.NearestRequest(run="bystander").SerializeToString() + query


FLOODS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "absent classes": ("BeginPush", lambda size: begin(varints(1 << 21, size // 4))),
    "absent, every other": ("BeginPush", lambda size: begin(varints(1 << 21, size // 4, 2))),
    "absent, one byte each": ("BeginPush", lambda size: begin(bytes(size))),
    "absent, not packed": ("BeginPush", lambda size: begin(b"") + b"\x50\x01" * (size // 2)),
    "retention, again and again": ("BeginPush", lambda size: begin(b"") + b"\x4a\x00" * (size // 2)),
    "fields nobody knows": ("GetPush", lambda size: b"\xfa\x7f\x00" * (size // 3)),
    "a name": ("GetRun", lambda size: field_of(1, b"a" * size)),
    "vectors": (
        "Nearest",
        lambda size: nearest(field_of(5, b"\x08\x01\x10\x01" + field_of(15, bytes(size)))),
    ),
    "class ids": ("Nearest", lambda size: nearest(field_of(4, field_of(1, bytes(size))))),
    "rows": ("WriteRows", lambda size: field_of(1, b"f" * 24) + field_of(15, bytes(size))),
    "noise": ("CommitPush", lambda size: b"\xff" * size),
}
"""What is sent: the method, and its message of about so many bytes. Or "rows of PUSH": four times as many."""


def flood(address: str, kind: str, count: int, size: int) -> Counter[str]:
    """So many calls at the same time, each on a connection of its own; how they ended."""
    push_id = kind.removeprefix("rows of ")
    method, made = FLOODS["rows" if push_id != kind else kind]
    raw, ends = made(size), Counter[str]()
    if push_id != kind:
        raw = field_of(1, push_id.encode()) + field_of(15, bytes(size))

    def call(number: int) -> None:
        options = [*ANY_LENGTH, ("nearkin.flood", number)]
        with grpc.insecure_channel(address, options=options) as channel:
            multi: Any = channel
            try:
                if method == "WriteRows":
                    multi.stream_unary(PATH + method)(iter([raw] * 4), timeout=CALL_SECONDS)
                else:
                    multi.unary_unary(PATH + method)(raw, timeout=CALL_SECONDS)
                ends["OK"] += 1
            except grpc.RpcError as error:
                ends[code_of(error).name] += 1

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


@dataclass
class Probes:
    """How long health took to answer, over one connection and over new ones in turn."""

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def slowest(self) -> float:
        return max(self.seconds)


@contextmanager
def probing(address: str) -> Iterator[Probes]:
    """Asks for health all the while."""
    probes, ended = Probes(), threading.Event()

    def ask(channel: grpc.Channel) -> None:
        began = time.monotonic()
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        except grpc.RpcError as error:
            probes.failed.append(code_of(error).name)
        probes.seconds.append(time.monotonic() - began)

    def work() -> None:
        with grpc.insecure_channel(address, options=ANY_LENGTH) as standing:
            while not ended.is_set():
                ask(standing)
                with grpc.insecure_channel(address, options=ANY_LENGTH) as fresh:
                    ask(fresh)
                ended.wait(0.02)

    prober = threading.Thread(target=work)
    prober.start()
    try:
        yield probes
    finally:
        ended.set()
        prober.join()


def flooding(address: str, kind: str, count: int, size: int, processes: int) -> Counter[str]:
    """The same from several processes, which begin together; how the calls ended."""
    command = [
        sys.executable,
        "-m",
        "tests.service.flooding",
        address,
        kind,
        str(count // processes),
        str(size),
    ]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    ends = Counter[str]()
    for worker in workers:
        answer, _ = worker.communicate()
        ends.update(answer.split())
    return ends


if __name__ == "__main__":
    where, what, calls, nbytes = sys.argv[1:]
    print(*flood(where, what, int(calls), int(nbytes)).elements())
