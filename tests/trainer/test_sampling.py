"""Batches are what they promise, for any sizes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nearkin_trainer.sampling import ClassSampler, GraphSampler, ImagesOfClasses, Turns
from numpy.typing import NDArray


def _labels(sizes: list[int]) -> NDArray[np.int64]:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))


def _table(num_classes: int, k: int) -> NDArray[np.int32]:
    """Classes on a ring: the nearest are the next ones."""
    return ((np.arange(num_classes)[:, None] + np.arange(1, k + 1)) % num_classes).astype(np.int32)


sizes_of_classes = st.lists(st.integers(1, 5), min_size=2, max_size=20)


@given(sizes=sizes_of_classes, data=st.data())
def test_every_batch_has_p_classes_and_k_images(sizes: list[int], data: st.DataObject) -> None:
    labels = _labels(sizes)
    classes = data.draw(st.integers(1, len(sizes)))
    per_class = data.draw(st.integers(1, 6))
    turns = Turns(len(sizes), steps=data.draw(st.integers(1, 5)), seed=data.draw(st.integers(0, 99)))
    images = ImagesOfClasses(labels, len(sizes))
    kin = data.draw(st.integers(1, classes))
    for sampler in (
        ClassSampler(images, turns, classes, per_class),
        GraphSampler(images, turns, classes, per_class),
        GraphSampler(
            images,
            turns,
            classes,
            per_class,
            kin=kin,
            reach=min(kin + 2, len(sizes) - 1) if kin + 2 < len(sizes) else None,
        ),
    ):
        batches = list(sampler.batches(3, _table(len(sizes), len(sizes) - 1)))
        assert len(batches) == sampler.steps == turns.steps
        for batch in batches:
            assert len(batch) == sampler.batch_size == classes * per_class
            counts = Counter(labels[batch].tolist())
            assert len(counts) == classes
            assert set(counts.values()) == {per_class}
            for label in counts:
                distinct = len(set(batch[labels[batch] == label].tolist()))
                assert distinct == min(per_class, sizes[label])


@given(st.integers(2, 15), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_ranks_together_go_through_all_classes(
    num_classes: int, steps: int, world: int, per_step: int
) -> None:
    epochs = -(-num_classes // (steps * world * per_step)) * 2
    ranks = [Turns(num_classes, steps, seed=5, rank=r, world_size=world) for r in range(world)]
    rows = [np.stack([t.of_epoch(e, per_step) for t in ranks], axis=1) for e in range(epochs)]
    sequence = np.concatenate([row.reshape(-1) for row in rows])
    for start in range(0, len(sequence) - num_classes + 1, num_classes):
        assert sorted(sequence[start : start + num_classes]) == list(range(num_classes))


@given(st.integers(0, 1000), st.integers(0, 5), st.integers(0, 1))
def test_the_same_seed_epoch_and_rank_give_the_same_batches(seed: int, epoch: int, rank: int) -> None:
    images = ImagesOfClasses(_labels([3] * 12), 12)
    table = _table(12, 6)

    def batches(epoch: int, rank: int) -> list[list[int]]:
        turns = Turns(12, 3, seed, rank, world_size=2)
        return [b.tolist() for b in GraphSampler(images, turns, 4, 2, reach=6).batches(epoch, table)]

    first = batches(epoch, rank)
    assert first == batches(epoch, rank)
    assert first != batches(epoch + 1, rank)
    assert first != batches(epoch, 1 - rank)


def test_a_graph_batch_is_a_class_and_its_nearest() -> None:
    labels = _labels([2] * 30)
    sampler = GraphSampler(ImagesOfClasses(labels, 30), Turns(30, 30, seed=0), 4, 2)
    centres = set()
    for batch in sampler.batches(0, _table(30, 8)):
        classes = list(dict.fromkeys(labels[batch].tolist()))
        assert classes == [(classes[0] + i) % 30 for i in range(4)]
        centres.add(classes[0])
    assert centres == set(range(30))


def test_neighbourhoods_stay_within_reach() -> None:
    labels = _labels([2] * 40)
    sampler = GraphSampler(ImagesOfClasses(labels, 40), Turns(40, 10, seed=0), 6, 2, kin=3, reach=5)
    for batch in sampler.batches(0, _table(40, 8)):
        classes = list(dict.fromkeys(labels[batch].tolist()))
        assert len(classes) == 6
        assert all((c - classes[0]) % 40 <= 5 for c in classes[1:3])


def test_holes_in_the_table_are_filled_with_others() -> None:
    labels = _labels([2] * 10)
    table = np.full((10, 5), -1, dtype=np.int32)
    sampler = GraphSampler(ImagesOfClasses(labels, 10), Turns(10, 4, seed=0), 4, 2)
    assert all(len(set(labels[batch])) == 4 for batch in sampler.batches(0, table))


def test_a_narrow_table_is_refused() -> None:
    sampler = GraphSampler(ImagesOfClasses(_labels([2] * 10), 10), Turns(10, 1, seed=0), 6, 2)
    with pytest.raises(ValueError, match=r"k >= 5, not k=3"):
        next(sampler.batches(0, _table(10, 3)))


def test_a_class_without_images_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least one image"):
        ImagesOfClasses(np.array([0, 2]), 3)
