"""Nothing in a training step may cost O(num_classes): what it makes and reads is the same at any number."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nearkin_trainer.checkpoint import seed_everything
from nearkin_trainer.classes import ROW_OPTIMISERS, ClassEmbeddings, Host, optimisers, table
from nearkin_trainer.distributed import World
from nearkin_trainer.matching import SparseQAConv
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.learners import WAYS, made

pytestmark = pytest.mark.usefixtures("one_thread")


FEW, MANY = 100, 50_000
ROW_WISE = {
    *("alias", "detach", "view", "slice"),
    *("index", "index_put_", "index_select", "index_add_", "index_copy_"),
}
PLACES: dict[str, dict[str, Any]] = {
    "whole": {"sharded": False},
    "in place": {"sharded": False},  # how large rows are read; these are small
    "sharded": {"sharded": True},
    "host": {"sharded": False, "host": Host(16)},  # a step reads more
}
NOISE = 16 * 1024  # bytes that Python itself may take more or less of


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each operation with the numbers that it has made, and which were given a table."""

    def __init__(self, tables: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tables = {table.untyped_storage().data_ptr() for table in tables}
        self.notes: list[tuple[str, int]] = []
        self.given: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if any(self._is_table(value) for value in args):
            self.given.add(func.overloadpacket.__name__)
        for value in made if isinstance(made, tuple | list) else [made]:
            if isinstance(value, torch.Tensor):
                self.notes.append((str(func), self._size(value)))
        return made

    def _size(self, value: torch.Tensor) -> int:
        if value.is_sparse:
            return value._values().numel()
        # The table itself, changed in place or looked at, was there before.
        return 0 if self._is_table(value) else value.numel()

    def _is_table(self, value: object) -> bool:
        if not isinstance(value, torch.Tensor) or value.is_sparse:
            return False
        return value.untyped_storage().data_ptr() in self._tables


def _step(num_classes: int, way: str, backend: str, place: str) -> Callable[[], list[tuple[str, int]]]:
    model, learner = made(World(), way, num_classes, backend=backend, **PLACES[place])
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(4).repeat_interleave(2) * 20
    neighbours = torch.arange(8 * 5).view(8, 5) * 2 + 1
    tables = [*model.classes.state_dict().values(), *learner.state()["row_optimiser"].values()]
    if model.classes.cache is not None:
        tables.append(model.classes.cache._slots)

    def take() -> list[tuple[str, int]]:
        seed_everything(1)
        with _Made(tables) as made:
            learner.learn(pixels, labels, neighbours)
        assert made.given <= ROW_WISE, made.given - ROW_WISE
        notes: list[tuple[str, int]] = made.notes
        return notes

    return take


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", WAYS)
def test_tensors_are_as_large_at_any_number_of_classes(
    way: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "in place":
        monkeypatch.setattr(table, "SMALL_ROW_BYTES", 0)
    few = _step(FEW, way, "plain", place)()
    many = _step(MANY, way, "plain", place)()
    assert few == many
    assert max(size for _, size in many) < MANY


def test_memory_of_the_compiled_loops_is_the_same_at_any_number_of_classes() -> None:
    peaks = []
    for classes in (FEW, MANY):
        take = _step(classes, "adam", "cpu", "whole")
        take()
        peaks.append(min(_peak(take) for _ in range(3)))  # what else the process does is counted, too
    assert abs(peaks[1] - peaks[0]) < NOISE


def _peak(take: Callable[[], object]) -> int:
    tracemalloc.start()
    take()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("name", sorted(ROW_OPTIMISERS))
def test_an_update_makes_no_second_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a step returns is used block by block."""
    monkeypatch.setattr(optimisers, "BLOCK_BYTES", 5 * 4 * 16)
    table = ClassEmbeddings(90, 4, 2, 2)
    matcher, optimiser = SparseQAConv(90, 4, 2, 2, classes=table), table.optimiser(name)  # type: ignore[arg-type]
    matcher(
        torch.randn(2, 4, 2, 2), torch.tensor([1, 2]), torch.arange(3, 63).view(2, 30)
    ).scores.sum().backward()
    (read,) = table._reads
    assert read.values.grad is not None
    values = read.values.grad._values()
    with _Made([table.weight, *optimiser.buffers(), values]) as made:
        gradient = table.take_gradient(World())
        assert gradient is not None
        assert len(gradient.ids) == 62
        table.update(optimiser, gradient, rate=0.1)
    assert 0 < max(size for _, size in made.notes) <= 5 * 16
