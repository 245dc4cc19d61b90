"""Two real processes: what they exchange, and what they share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from nearkin_client import NeighbourClient
from nearkin_client.errors import PushFailed, Unavailable
from nearkin_trainer.checkpoint import seed_everything
from nearkin_trainer.classes import ClassEmbeddings, Rows, exchange
from nearkin_trainer.config import EmbeddingConfig, ImageConfig, ModelConfig, TrainConfig
from nearkin_trainer.distributed import (
    OtherProcessFailed,
    World,
    average_buffers,
    average_gradients,
    broadcast_module,
    end_process,
    gather_rows,
    join_world,
    tell_all,
    tell_node,
)
from nearkin_trainer.learner import Learner
from nearkin_trainer.model import build_model
from nearkin_trainer.neighbours import NeighbourConfig, Neighbours
from nearkin_trainer.node import node_array, wait_for_node

from tests.trainer.processes import run_together


def _together(size: int = 2) -> None:
    """Runs every `check_` of this module in `size` processes."""
    printed = run_together("tests.trainer.test_distributed", size=size, seconds=120)
    for name in CHECKS:
        assert printed.count(f"{name} passed") == size, (name, printed)


def check_text(world: World) -> None:
    assert tell_all(world, "grüße" if world.leads else None) == "grüße"
    assert tell_node(world, "" if world.leads_node else None) == ""


def check_gather(world: World) -> None:
    rows = torch.full((world.rank * 3, 2), float(world.rank))
    parts = gather_rows(world, rows)
    assert [len(p) for p in parts] == [r * 3 for r in range(world.size)]
    assert all((p == r).all() for r, p in enumerate(parts))


def check_exchange(world: World) -> None:
    """Overlapping rows are summed; the bits are the same everywhere."""
    mine = Rows(torch.tensor([1, 4]) + world.rank * 3, torch.full((2, 1, 1, 1), 1.0 + world.rank))
    rows = exchange(world, mine)
    assert rows.ids.tolist() == [1, 4, 7]
    assert rows.values.flatten().tolist() == [1, 3, 2]
    assert exchange(world, mine, average=True).values.flatten().tolist() == [1, 1.5, 2]
    empty = exchange(world, Rows(mine.ids[:0], mine.values[:0]))
    assert len(empty.ids) == 0


def check_gradients(world: World) -> None:
    used, unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
    layers = torch.nn.Sequential(used, unused)
    broadcast_module(world, layers)
    weights = gather_rows(world, used.weight.detach()[None])
    assert torch.equal(weights[0], weights[-1])
    if world.rank == 0:
        used(torch.ones(1, 2)).sum().backward()
    average_gradients(world, layers.parameters())
    assert used.weight.grad is not None
    assert unused.bias.grad is not None
    assert torch.equal(used.weight.grad, torch.full((2, 2), 1 / world.size))
    assert torch.equal(unused.bias.grad, torch.zeros(1))


def check_buffers(world: World) -> None:
    norm = torch.nn.BatchNorm1d(1)
    norm.running_mean.fill_(world.rank)  # type: ignore[union-attr]
    average_buffers(world, norm)
    assert norm.running_mean.item() == pytest.approx((world.size - 1) / 2)  # type: ignore[union-attr]


class HalfBroken:
    """Stands for a client: in process 1, epoch 1 cannot be pushed; in process 0, epoch 2 has no table."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def push(self, rows: torch.Tensor, *, epoch: int, **_: object) -> SimpleNamespace:
        if (self._rank, epoch) == (1, 1):
            raise Unavailable("nobody there")
        return SimpleNamespace(push_id="")

    def table(self, *, epoch: int, **_: object) -> SimpleNamespace:
        if epoch == 2:
            raise PushFailed("out of paper")
        return SimpleNamespace(epoch=epoch, generation=epoch + 1, ids=np.full((4, 2), epoch, np.int32))


def check_refresh(world: World) -> None:
    """All processes train with the same table; what fails in one of them is raised in all, and none hangs."""
    classes, client = ClassEmbeddings(4, 2, 1, 1), cast("NeighbourClient", HalfBroken(world.rank))
    for staleness in (0, 1):
        with Neighbours(world, client, NeighbourConfig(k=2), 4, staleness) as neighbours:
            assert (neighbours.refresh(0, classes) == 0).all()
            assert neighbours.generation == 1
            with raises_what_process(world, 1, Unavailable, "nobody there"):
                neighbours.refresh(1, classes)
                assert staleness
                neighbours.settle()
            with raises_what_process(world, 0, PushFailed, "out of paper"):
                neighbours.refresh(2, classes)
                assert staleness
                neighbours.refresh(3, classes)


@contextmanager
def raises_what_process(world: World, rank: int, kind: type[Exception], message: str) -> Iterator[None]:
    if world.rank == rank:
        with pytest.raises(kind, match=f"^{message}$"):
            yield
    else:
        with pytest.raises(OtherProcessFailed, match=f"process {rank} failed: {kind.__name__}: {message}"):
            yield


def check_shared_memory(world: World) -> None:
    """What one process writes the others read, and no file is left."""
    shared = node_array(world, (5, world.local_size), np.int32)
    shared[:, world.local_rank] = world.local_rank + 1
    wait_for_node(world)
    assert (shared == np.arange(1, world.local_size + 1)).all()
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/nearkin-" in line]
    assert mapped
    assert all(line.endswith("(deleted)") for line in mapped)


def check_learning(world: World) -> None:
    """After a few steps on different batches, all processes hold the same bits."""
    for keeping in ("learnable", "memory"):
        config = TrainConfig(
            data=Path("d"),
            out=Path("o"),
            image=ImageConfig(height=16, width=16),
            model=ModelConfig(channels=8, width=4, matching="plain"),
            embedding=EmbeddingConfig(keeping=keeping),
        )
        seed_everything(0)
        model = build_model(config.model, config.image, 30, keeping=keeping, device=world.device)
        learner = Learner(config, world, model.train(), total_steps=3)
        seed_everything(1, world.rank)
        for _ in range(3):
            labels = torch.randint(0, 30, (4,)).repeat_interleave(2)
            pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
            learner.learn(pixels, labels, torch.randint(0, 30, (8, 5)))
        average_buffers(world, model)
        for name, tensor in {**model.state_dict(), **learner.state()["row_optimiser"]}.items():
            copies = gather_rows(world, tensor[None].float())
            assert all(torch.equal(copies[0], copy) for copy in copies), (keeping, name)


CHECKS: dict[str, Callable[[World], None]] = {
    name: check for name, check in list(globals().items()) if name.startswith("check_")
}


def test_two_processes() -> None:
    _together(2)


def test_one_process() -> None:
    world = World()
    check_text(world)
    check_gather(world)
    assert node_array(world, (2, 3), np.int32).shape == (2, 3)


def test_shares_cover_everything_once() -> None:
    for size in (1, 2, 3, 7):
        for count in (0, 1, 5, 14):
            shares = [
                World(rank=r, size=size, local_rank=r, local_size=size).share(count) for r in range(size)
            ]
            assert [i for s in shares for i in range(s.start, s.stop)] == list(range(count))
            assert max(s.stop - s.start for s in shares) - min(s.stop - s.start for s in shares) <= 1


def test_a_contradicting_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK=3, WORLD_SIZE=2"), join_world("cpu"):
        pass
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(ValueError, match="RANK='three'"), join_world("cpu"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_by_name_needs_cuda() -> None:
    with pytest.raises(ValueError, match="no usable CUDA device"), join_world("cuda"):
        pass


if __name__ == "__main__":
    with join_world("cpu") as joined:
        for check_name, checked in CHECKS.items():
            checked(joined)
            print(f"{check_name} passed", flush=True)
    end_process(0)
