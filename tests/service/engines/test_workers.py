"""Items shared among threads: each done once, and what a thread is asked between two of them."""

from __future__ import annotations

import threading
from collections import defaultdict

import pytest
from nearkin_service.engines import workers
from nearkin_service.engines.workers import in_threads


@pytest.fixture(autouse=True)
def three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "worker_count", lambda: 3)


@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_every_item_is_done_once_and_counted(count: int) -> None:
    done: list[int] = []
    told: list[int] = []
    in_threads(done.append, range(count), told.append)
    assert sorted(done) == list(range(count))
    assert set(told) == {*range(1, count + 1), count}


def test_who_has_done_an_item_rests_before_the_next() -> None:
    """A build that is to give way does so with all of its threads, not with the one that waits for them."""
    together = threading.Barrier(3)
    story = defaultdict(list)

    def work(item: int) -> None:
        if item < 3:
            together.wait(30)
        story[threading.get_ident()].append("work")

    in_threads(work, range(60), lambda done: story[threading.get_ident()].append("rest"))
    assert story.pop(threading.get_ident()) == ["rest"], "the caller's own, at the end"
    assert len(story) == 3
    for events in story.values():
        assert events == ["work", "rest"] * (len(events) // 2)


@pytest.mark.parametrize("where", ["work", "meanwhile"])
def test_the_first_exception_ends_the_others_before_their_next_item(where: str) -> None:
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        if where == "work" and item == 5:
            raise KeyError(item)

    def meanwhile(done: int) -> None:
        if where == "meanwhile" and done == 5:
            raise KeyError(done)

    with pytest.raises(KeyError, match="5"):
        in_threads(work, range(100_000), meanwhile)
    assert len(begun) < 100_000
