"""SIGKILL at every named moment of the service's life; what was published or acknowledged survives it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service import faults

from tests.service.conftest import Caller, code_of, eventually
from tests.service.faulting import Process, Story, litter, persistently, segments

STORY = Story("faces")
RETENTION = pb.Retention(keep_embeddings=1, keep_tables=2)
EPOCHS = 3

# Documents are written all the time: kill at the first one, and at some in the middle of things.
POINTS = [
    *(point for point in faults.POINTS if not point.startswith("document")),
    *(f"document.{step}:{time}" for step in ("written_aside", "renamed") for time in (1, 4)),
    *(
        pytest.param(f"document.{step}:{time}", marks=pytest.mark.soak)
        for step in ("written_aside", "renamed")
        for time in (2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13)
    ),
]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    process = Process(tmp_path)
    yield process
    if process.running:
        process.kill()


def live(caller: Caller, first: int = 0) -> Iterator[Callable[[], object]]:
    """A service's whole life, step by step: epochs, retention, an aborted push."""
    for epoch in range(first, EPOCHS):
        yield lambda epoch=epoch: STORY.push(caller, epoch, retention=RETENTION)  # type: ignore[misc]
        yield lambda epoch=epoch: STORY.table(caller, epoch)  # type: ignore[misc]
    yield lambda: abort(caller, 77)
    yield lambda: settled(caller)


def abort(caller: Caller, epoch: int) -> None:
    """An epoch is begun, gets some rows, and comes to nothing."""
    rows = STORY.rows(epoch)
    push_id = caller.begin(rows, epoch, run=STORY.run, commit_when_complete=False).push.push_id
    caller.write(push_id, rows[:10])
    caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id), timeout=30)


def settled(caller: Caller) -> list[pb.Generation]:
    """The generations once retention is through and the newest embeddings are safe."""
    return eventually(
        lambda: caller.generations(STORY.run),
        lambda found: (
            [g.embeddings for g in found] == [pb.EMBEDDINGS_STATE_KEPT, pb.EMBEDDINGS_STATE_DROPPED]
        ),
    )


def until_death(caller: Caller, done: list[object]) -> None:
    for step in live(caller):
        done.append(step())  # noqa: PERF401 - what was done before the death is kept
    caller.generation(run=STORY.run)


@pytest.mark.parametrize("fault", POINTS)
def test_killed_at(fault: str, process: Process) -> None:
    before = segments()
    process.start(fault)
    caller = Caller(process.address)
    done: list[object] = []
    with pytest.raises(grpc.RpcError) as death:
        until_death(caller, done)
    assert code_of(death.value) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    assert process.ended() == -signal.SIGKILL, f"the service never came to {fault}"
    caller.channel.close()

    assert process.start()
    caller = Caller(process.address)
    published = {g.epoch: g.generation for g in caller.generations(STORY.run)} if done else {}
    for number in published.values():
        assert not STORY.wrong(caller.table(run=STORY.run, generation=number))
    for step in live(caller, first=max(published, default=0)):
        persistently(step)
    generations = settled(caller)
    assert [g.epoch for g in generations] == [EPOCHS - 1, EPOCHS - 2]
    assert len({g.generation for g in generations}) == 2
    assert all(published.get(g.epoch, g.generation) == g.generation for g in generations)
    for generation in generations:
        assert not STORY.wrong(caller.table(run=STORY.run, generation=generation.generation))
    assert caller.nearest([3], run=STORY.run).generation == generations[0].generation
    caller.channel.close()
    assert process.terminate() == 0
    assert not litter(process.data, outcomes=2)
    assert not list(process.folder.glob("*.sock"))
    assert segments() == before


def test_a_push_that_was_complete_when_its_service_died_is_built_though_nobody_calls_again(
    process: Process,
) -> None:
    """The last row was stored and not answered for: a client that asks sees it there and sends no more."""
    rows = STORY.rows(0)
    process.start("write.noted")
    caller = Caller(process.address)
    push_id = caller.begin(rows, run=STORY.run, k=STORY.k).push.push_id
    with pytest.raises(grpc.RpcError):
        caller.write(push_id, rows)
    process.ended()
    caller.channel.close()
    process.start()
    caller = Caller(process.address)
    assert not STORY.wrong(STORY.table(caller, 0))
    caller.channel.close()


def test_an_unknown_point_is_refused(process: Process) -> None:
    assert not process.start("no.such.point")
    assert process.ended() not in (0, -signal.SIGKILL)
    assert "there is no such point" in process.log.read_text()
