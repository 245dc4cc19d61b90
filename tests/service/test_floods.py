"""gRPC health answers, on the event loop and on threads, whatever others send, and however much of it.

    pytest -m soak tests/service/test_floods.py -s

The bounds are no times to be proud of (docs/RELIABILITY.md has those): they tell starved probes from a
slow machine.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import NeighbourClient

from tests.service.conftest import Caller, message, random_rows
from tests.service.faulting import Process
from tests.service.flooding import FLOODS, MIB, Probes, flooding, probing
from tests.service.test_callers import still_serves

TAKEN, TOO_LARGE = 15 * MIB, 60 * MIB
STARVED_SECONDS = 2.5
"""Twelve million numbers that no thread looked at used to take 7.5 s."""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path, "--health", f"unix://{tmp_path}/health.sock")
    assert process.start(), process.log.read_text()
    with speaking(process) as caller:
        caller.push(random_rows(60, 8), run="bystander")
    yield process
    if process.running:
        process.kill()


@contextmanager
def speaking(process: Process) -> Iterator[Caller]:
    caller = Caller(process.address)
    yield caller
    caller.channel.close()


def peak_mib(process: Process) -> int:
    assert process.process is not None
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10


def unstarved(process: Process, what: str, send: Callable[[], object]) -> Probes:
    """Health was answered all the while, and the service goes on."""
    with probing(process.address) as probes, probing(f"unix://{process.folder}/health.sock") as apart:
        ends = send()
    in_order = sorted(probes.seconds)
    summary = {
        "flood": what,
        "ends": ends,
        "probes": len(in_order),
        "median_ms": round(in_order[len(in_order) // 2] * 1e3),
        "slowest_ms": round(in_order[-1] * 1e3),
        "slowest_on_threads_ms": round(apart.slowest * 1e3),
        "peak_mib": peak_mib(process),
    }
    print(json.dumps(summary))
    assert not probes.failed + apart.failed, summary
    assert max(probes.slowest, apart.slowest) < STARVED_SECONDS, summary
    with speaking(process) as caller:
        still_serves(caller)
    return probes


def test_health_answers_whatever_large_message_comes(process: Process) -> None:
    for kind in FLOODS:
        unstarved(process, kind, lambda: flooding(process.address, kind, 2, TAKEN, 1))  # noqa: B023
    assert "Traceback" not in process.log.read_text()


def test_messages_above_the_limit_cost_nothing(process: Process) -> None:
    before = peak_mib(process)
    unstarved(process, "too large", lambda: flooding(process.address, "absent classes", 8, TOO_LARGE, 1))
    assert peak_mib(process) < before + 256


def test_a_client_declares_millions_absent(process: Process) -> None:
    """More than one message holds; the service need not be told another limit."""
    classes = 6_000_000
    rows, absent = random_rows(20, 4), range(20, classes)
    with NeighbourClient(process.address, run="wide", shared_memory=False) as client:
        push = client.push(rows, epoch=0, k=3, num_classes=classes, absent=absent, commit=False)
        assert (push.absent_count, push.rows_stored) == (classes - 20, 20)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [TAKEN, TOO_LARGE], ids=["15 MiB", "60 MiB"])
@pytest.mark.parametrize("kind", FLOODS)
def test_sixty_at_the_same_time(process: Process, kind: str, size: int) -> None:
    unstarved(process, kind, lambda: flooding(process.address, kind, 60, size, processes=4))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_streams_of_rows_beside_stalled_ones(process: Process) -> None:
    """Sixty-four streams of ordinary chunks, five hundred that have sent one and wait."""
    rows, released = np.zeros((2048, 1024), np.float32), threading.Event()
    with speaking(process) as caller:
        push_id = caller.begin(rows, commit_when_complete=False).push.push_id

        def stalling() -> Iterator[pb.WriteRowsRequest]:
            yield message(push_id, rows[:1], 0)
            released.wait(300)

        stalled = [caller.stub.WriteRows.future(stalling()) for _ in range(500)]
        unstarved(
            process,
            "64 streams, 500 stalled",
            lambda: flooding(process.address, f"rows of {push_id}", 64, 4 * MIB, processes=4),
        )
        released.set()
        for call in stalled:
            call.cancel()
