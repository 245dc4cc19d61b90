"""The events of a run, in the order in which things happened."""

from __future__ import annotations

import numpy as np
from nearkin_client import (
    BuildProgress,
    GenerationPublished,
    GenerationRemoved,
    NeighbourClient,
    PushChanged,
    RunRemoved,
    RunSnapshot,
)

generator = np.random.default_rng(2)


def test_a_run_from_before_its_first_push_to_its_end(nearkin: NeighbourClient) -> None:
    rows = generator.standard_normal((30, 6)).astype(np.float32)
    events = nearkin.watch(timeout=60)
    nearkin.push(rows[:10], epoch=0, num_classes=30, k=3)
    nearkin.push(rows[10:], epoch=0, row_start=10, num_classes=30, k=3)
    seen = []
    for event in events:
        seen.append(event)
        if isinstance(event, GenerationPublished):
            nearkin.delete_generation(event.generation.generation)
        if isinstance(event, GenerationRemoved):
            nearkin.delete_run()
        if isinstance(event, RunRemoved):
            break
    published = next(each for each in seen if isinstance(each, GenerationPublished))
    assert (published.generation.epoch, published.generation.num_classes) == (0, 30)
    removed = next(each for each in seen if isinstance(each, GenerationRemoved))
    assert removed.generation == published.generation.generation
    assert [each.time for each in seen] == sorted(each.time for each in seen)


def test_the_first_event_is_the_state_of_the_run(nearkin: NeighbourClient) -> None:
    nearkin.push(generator.standard_normal((30, 6)).astype(np.float32), epoch=5, k=3)
    nearkin.table(epoch=5, timeout=30)
    first = next(nearkin.watch(timeout=30))
    assert isinstance(first, RunSnapshot)
    assert first.run.newest is not None
    assert first.run.newest.epoch == 5


def test_a_build_tells_how_far_it_is(nearkin: NeighbourClient) -> None:
    rows = generator.standard_normal((4000, 256)).astype(np.float32)
    nearkin.push(rows[:1], epoch=0, num_classes=4000, k=50)
    events = nearkin.watch(timeout=60)
    assert isinstance(next(events), RunSnapshot)
    nearkin.push(rows, epoch=0, k=50)
    seen = []
    for event in events:
        seen.append(event)
        if isinstance(event, GenerationPublished):
            break
    states = [each.push.state for each in seen if isinstance(each, PushChanged)]
    assert "building" in states
    progress = [each for each in seen if isinstance(each, BuildProgress)]
    assert progress
    assert all(0 <= each.rows_done <= each.rows_total for each in progress)
    assert {each.epoch for each in progress} == {0}


def test_watching_ends_after_its_timeout(nearkin: NeighbourClient) -> None:
    assert len(list(nearkin.watch(timeout=0.3))) <= 1
