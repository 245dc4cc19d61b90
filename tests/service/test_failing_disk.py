"""A disk that answers with an error at any call: what was published stays, and all works afterwards."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from nearkin.v1 import neighbours_pb2 as pb

from tests.service.conftest import Caller, Service, code_of, eventually
from tests.service.faulting import Story, litter

Start = Callable[..., Service]
STORY = Story("faces", most_classes=60)
CALLS = {"write": 9, "pwrite": 7, "fsync": 9, "link": 2, "rename": 3, "replace": 5}
"""Of an epoch: how many there are, or more than enough; that some are not reached in time is no matter."""


class Failing:
    """The nth call of one kind that concerns a directory ends in EIO."""

    def __init__(self, name: str, nth: int, place: Path) -> None:
        self._call, self._left, self._place = getattr(os, name), nth, str(place)
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._concerns(args[0]):
            with self._lock:
                self._left -= 1
                if self._left == 0:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._call(*args, **kwargs)

    def _concerns(self, what: Any) -> bool:
        path = Path(f"/proc/self/fd/{what}").readlink() if isinstance(what, int) else os.fspath(what)
        return str(path).startswith(self._place)


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, name: str, nth: int, place: Path) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setattr(os, name, Failing(name, nth, place))
        yield


def attempt(caller: Caller, epoch: int) -> str:
    """How it ends to push an epoch and wait for its table: "" if well."""
    try:
        STORY.push(caller, epoch, retention=pb.Retention(keep_embeddings=1))
        STORY.table(caller, epoch)
    except grpc.RpcError as error:
        return f"{code_of(error).name}: {error.details()}"
    return ""


def give_up(caller: Caller) -> None:
    for push in caller.stub.GetRun(pb.GetRunRequest(run=STORY.run), timeout=30).pushes:
        caller.stub.AbortPush(pb.AbortPushRequest(push_id=push.push_id), timeout=30)


def intact(caller: Caller, before: bytes) -> None:
    assert caller.table(run=STORY.run, generation=1).ids.tobytes() == before


@pytest.mark.parametrize(
    ("name", "nth"), [(name, nth) for name, most in CALLS.items() for nth in range(1, most + 1)]
)
def test_a_write_fails(
    start_service: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, nth: int
) -> None:
    service = start_service()
    caller = service.caller()
    assert not attempt(caller, 0)
    before = caller.table(run=STORY.run, generation=1).ids.tobytes()
    eventually(lambda: caller.generation(1, STORY.run).embeddings, lambda s: s == pb.EMBEDDINGS_STATE_KEPT)
    with failing(monkeypatch, name, nth, tmp_path / "data"):
        said = attempt(caller, 1)
    intact(caller, before)
    assert not said.startswith("INTERNAL"), said
    if said:
        give_up(caller)
    assert not attempt(caller, 1), said
    assert not STORY.wrong(caller.table(run=STORY.run))
    assert not attempt(caller, 2)
    service.stop()
    service = start_service()
    caller = service.caller()
    intact(caller, before)
    assert not attempt(caller, 3)
    for generation in caller.generations(STORY.run):
        assert not STORY.wrong(caller.table(run=STORY.run, generation=generation.generation))
    service.stop()
    assert [path.name for path in (tmp_path / "data/quarantine").iterdir()] == []
    assert not [each for each in litter(tmp_path / "data", outcomes=9) if "trash" not in each]
