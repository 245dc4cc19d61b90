"""A class table in host memory, the rows of recent steps on the device: the bits of one on the device.

No test has a GPU: the cache is in CPU memory too, and everything but the copies is the same code.
"""

import copy
import gc
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nearkin_trainer.classes import ClassEmbeddings, Host, Rows, mapped, shards, table
from nearkin_trainer.classes.host import RowCache
from nearkin_trainer.distributed import World
from nearkin_trainer.learner import Learner
from nearkin_trainer.matching import location_maxima
from nearkin_trainer.model import Model
from torch import nn

from tests.trainer.learners import WAYS, learn, made

pytestmark = pytest.mark.usefixtures("one_thread")


CLASSES = 31
CPU = torch.device("cpu")


def _state(model: Model, learner: Learner) -> dict[str, torch.Tensor]:
    found = {**model.state_dict(), **learner.state()["row_optimiser"]}
    return {name: values.clone() for name, values in found.items()}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert torch.equal(other[name], values), name


@pytest.mark.parametrize("way", WAYS)
def test_same_bits(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for fewer rows than a step reads, for a few steps', for all, and in a file."""
    monkeypatch.setattr(table, "SMALL_ROW_BYTES", 0)  # on the device, rows are read in place
    plain, learner = made(World(), way, CLASSES, sharded=False)
    losses = learn(World(), learner, CLASSES, range(6))
    for host in (Host(4), Host(24), Host(CLASSES), Host(24, tmp_path)):
        cached, other = made(World(), way, CLASSES, sharded=False, host=host)
        assert learn(World(), other, CLASSES, range(6)) == losses
        assert cached.classes.cache is not None
        assert len(cached.classes._cached) == min(host.cache_rows, CLASSES)
        if host.cache_rows == CLASSES:
            assert cached.classes.cache.brought <= CLASSES  # each at most once
        _same(_state(plain, learner), _state(cached, other))
        assert torch.equal(cached.classes.rows(slice(3, 9)), plain.classes.rows(slice(3, 9)))
    assert not [*tmp_path.iterdir()]  # its files have no names


@pytest.mark.parametrize("way", ["adam", "memory"])
def test_checkpoints_fit_both(way: str, tmp_path: Path) -> None:
    plain, learner = made(World(), way, CLASSES, sharded=False)
    cached, other = made(World(), way, CLASSES, sharded=False, host=Host(7))
    for name, model, taught in (("plain", plain, learner), ("cached", cached, other)):
        learn(World(), taught, CLASSES, range(2))
        tree = {"model": dict(model.state_dict()), "learner": taught.state()}
        shards.save(tmp_path / f"{name}.npz", tree, 1, World(), model.classes)
    expected = learn(World(), learner, CLASSES, range(2, 4))
    file = Host(7, tmp_path)
    for name, host in (("plain", Host(7)), ("cached", None), ("cached", Host(7)), ("cached", file)):
        model, taught = made(World(), way, CLASSES, sharded=False, host=host)
        learn(World(), taught, CLASSES, range(1))  # what is in the cache has to go
        tree = shards.load(tmp_path / f"{name}.npz")
        shards.restore_rows(tmp_path, tree, model.classes, taught.state()["row_optimiser"])
        model.load_state_dict(tree["model"])
        taught.restore(tree["learner"])
        assert learn(World(), taught, CLASSES, range(2, 4)) == expected
        _same(_state(plain, learner), _state(model, taught))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_rows_from_features(dtype: torch.dtype, tmp_path: Path) -> None:
    found = []
    for host in (None, Host(2), Host(2, tmp_path)):
        torch.manual_seed(0)
        table = ClassEmbeddings(9, 4, 1, 2, "memory", dtype, host=host)
        table.remember(Rows(torch.tensor([1, 2, 8]), torch.randn(3, 4, 1, 2)), momentum=0.5)
        table.start_from(World(), [(torch.randn(3, 4, 1, 2), torch.tensor([1, 5, 1]))])
        table.remember(Rows(torch.tensor([5, 8]), torch.randn(2, 4, 1, 2)), momentum=0.5)
        found.append({name: values.clone() for name, values in table.state_dict().items()})
    _same(*found[:2])
    _same(*found[1:])
    assert found[0]["seen"].nonzero().flatten().tolist() == [1, 2, 5, 8]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 9),
    turns=st.lists(st.sets(st.integers(0, 11), min_size=1).map(sorted), max_size=40),
)
def test_a_cache_loses_nothing(size: int, turns: list[list[int]]) -> None:
    """Whatever is read and changed in whichever order, rows are what they are without a cache."""
    table, plain = torch.zeros(12, 1, 1, 1), torch.zeros(12)
    cached = torch.zeros(min(size, 12), 1, 1, 1)
    cache = RowCache(Host(size), 12, CPU)
    cache.add(table, cached)
    for number, rows in enumerate(turns):
        for part, slots in cache.bring(torch.tensor(rows), change=number % 3 > 0):
            assert len(set(slots.tolist())) == len(slots)
            assert torch.equal(cached[slots].flatten(), plain[rows[part]])
            if number % 3:
                cached[slots] += number
        if number % 3:
            plain[rows] += number
    cache.flush()
    assert torch.equal(table.flatten(), plain)


def test_rows_that_rest_longest_make_room() -> None:
    table = torch.zeros(9, 1, 1, 1)
    cache = RowCache(Host(4), 9, CPU)
    cache.add(table, torch.zeros(4, 1, 1, 1))
    for rows in ([0, 1], [2, 3], [0], [4], [0, 2, 3, 4]):
        [*cache.bring(torch.tensor(rows))]
    assert cache.brought == 5  # 1 made room for 4
    for _ in range(100):
        [*cache.bring(torch.tensor([0, 2, 3, 4]))]
    assert cache.brought == 5
    assert len(cache._uses) < 10  # notes of uses do not pile up


@pytest.mark.parametrize("size", [2, 3, 9])
def test_rows_may_be_asked_for_twice(size: int) -> None:
    """As they are where several processes read the same row of a shared table."""
    table = ClassEmbeddings(9, 2, 1, 1, "memory", host=Host(size))
    table.remember(Rows(torch.tensor([1, 4, 6]), torch.ones(3, 2, 1, 1)), momentum=0.0)
    ids = torch.tensor([1, 3, 6, 1, 4, 6, 8])
    found = table._take(ids)
    table.state_dict()
    assert torch.equal(found, table.weight.detach()[ids])


def test_moving_the_model_leaves_the_table_where_it_is() -> None:
    table = ClassEmbeddings(9, 4, 1, 2, host=Host(2))
    table.to(torch.float64)
    assert table.weight.dtype == torch.float32


@pytest.mark.parametrize("shape", [(1000,), (1000, 3, 1, 1), (60, 64, 7, 7), (5, 512, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_file_are_written_where_they_are_read(
    shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Rows of less than a page, of several, and across pages; together with rows stored in place."""
    table = mapped.zeros(tmp_path, shape, dtype)
    plain = torch.zeros(shape, dtype=dtype)
    for turn in range(5):
        rows = torch.randperm(len(plain))[: 1 + len(plain) // 3]
        values = torch.randn(len(rows), *shape[1:]).to(dtype)
        mapped.fetch(table, rows)
        mapped.put(table, rows, values)
        table[turn] = turn
        plain[rows] = values
        plain[turn] = turn
        mapped.put_block(table, turn // 2, values[:2])
        plain[turn // 2 : turn // 2 + len(values[:2])] = values[:2]
        assert torch.equal(table, plain)


def test_a_file_is_closed_when_nobody_has_its_table_any_more(tmp_path: Path) -> None:
    table = mapped.zeros(tmp_path, (4, 3), torch.float32)
    descriptor = mapped._files[table.data_ptr()]
    row = table[2]
    del table
    gc.collect()
    assert os.fstat(descriptor)
    del row
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_full_disk_is_said_before_training(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"has no room for 36864\.0 GiB of class rows \(.+\); choose another out"
    ):
        Host(4, tmp_path).zeros(2**40, 3, 3, 1)  # more than any disk has
    assert not [*tmp_path.iterdir()]


def test_a_cache_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="cache_rows=0 must be at least 1"):
        Host(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["host", "file"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))])
def test_a_copy_is_a_table_of_its_own(
    how: Callable[[nn.ModuleList], nn.ModuleList], place: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """As averaged models and evaluations on the side make them."""
    torch.manual_seed(0)
    host = Host(8, tmp_path if place == "file" else None)
    first = ClassEmbeddings(CLASSES, 3, 2, 2, dtype=dtype, host=host)
    whole = nn.ModuleList([first, first.optimiser("adam")])
    ids = torch.tensor([2, 5, 7])

    def move(modules: nn.ModuleList, rate: float) -> None:
        one, optimiser = modules
        one.update(optimiser, Rows(ids, torch.ones(3, 3, 2, 2)), rate)  # type: ignore[operator]

    move(whole, 0.1)  # now in the cache, not at home
    second = how(whole)
    before = {name: values.clone() for name, values in whole.state_dict().items()}
    _same(before, second.state_dict())
    move(second, 0.2)
    _same(before, whole.state_dict())
    assert not torch.equal(second.state_dict()["0.weight"], before["0.weight"])
    assert (second.state_dict()["1.steps"][ids] == 2).all()
    move(whole, 0.2)
    _same(whole.state_dict(), second.state_dict())


def test_an_optimiser_may_be_made_after_the_first_scores() -> None:
    torch.manual_seed(0)
    one, other = (ClassEmbeddings(CLASSES, 3, 2, 2, host=host) for host in (Host(8), None))
    other.load_state_dict(one.state_dict())
    ids = torch.tensor([[2, 5, 7]])
    for each in (one, other):
        each.read(ids)
        each.update(each.optimiser("adam"), Rows(ids[0], torch.ones(3, 3, 2, 2)), 0.1)
    _same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("host", [None, Host(8)])
def test_a_copy_leaves_what_is_under_way(host: Host | None) -> None:
    one = ClassEmbeddings(CLASSES, 3, 2, 2, host=host)
    one.snapshot(slice(0, 10))
    rows, _ = one.read(torch.tensor([[2, 5, 7]]))
    maxima = location_maxima(torch.randn(1, 3, 2, 2), rows, torch.tensor([[0, 1, 2]]))
    maxima.sum().backward()  # type: ignore[no-untyped-call]
    other = copy.deepcopy(one)
    assert other.take_gradient(World()) is None
    gradient = one.take_gradient(World())
    assert gradient is not None
    assert gradient.ids.tolist() == [2, 5, 7]
