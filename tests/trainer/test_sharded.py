"""A sharded class table: the bits of a replicated one, on any number of processes."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nearkin_trainer.classes import ClassEmbeddings, Host, ShardedClassEmbeddings, shards, table
from nearkin_trainer.classes.owners import Errand
from nearkin_trainer.classes.table import NOISE_BLOCK, draw_noise
from nearkin_trainer.distributed import World, barrier, end_process, gather_rows, join_world, swap_rows
from nearkin_trainer.learner import Learner
from nearkin_trainer.matching import SparseQAConv
from nearkin_trainer.model import Model

from tests.trainer.learners import WAYS, learn, made
from tests.trainer.processes import run_together

pytestmark = pytest.mark.usefixtures("one_thread")


CLASSES = 31  # not a multiple of the number of processes


def _made(world: World, way: str, *, sharded: bool) -> tuple[Model, Learner]:
    return made(world, way, CLASSES, sharded=sharded)


def _learn(world: World, learner: Learner, first: int, last: int, *, ahead: bool = True) -> list[float]:
    return learn(world, learner, CLASSES, range(first, last), ahead=ahead)


def _tree(model: Model, learner: Learner) -> dict[str, Any]:
    return {"model": dict(model.state_dict()), "learner": learner.state()}


def _whole(world: World, values: torch.Tensor) -> torch.Tensor:
    return torch.cat(gather_rows(world, values))


def check_swap(world: World) -> None:
    parts = [torch.full((to, 2), 10.0 * world.rank + to) for to in range(world.size)]
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        got = swap_rows(world, [part.to(dtype) for part in parts])
        assert [part.shape for part in got] == [(world.rank, 2)] * world.size
        assert all((part == 10.0 * rank + world.rank).all() for rank, part in enumerate(got))


def check_same_bits(world: World, folder: Path) -> None:
    """Losses, rows and optimisers are those of a replicated table; both are saved on the way."""
    for way in WAYS:
        one, one_learner = _made(world, way, sharded=False)
        other, other_learner = _made(world, way, sharded=True)
        assert isinstance(other.classes, ShardedClassEmbeddings)
        assert len(other.classes.weight) == len(range(CLASSES)[other.classes.kept])
        assert _learn(world, one_learner, 0, 2) == _learn(world, other_learner, 0, 2), way
        for name, model, learner in (("whole", one, one_learner), ("shared", other, other_learner)):
            (folder / way).mkdir(exist_ok=True)
            for epoch in (1, 2):
                path = folder / way / f"{name}.npz"
                shards.save(path, _tree(model, learner), epoch, world, model.classes)
        assert _learn(world, one_learner, 2, 4) == _learn(world, other_learner, 2, 4), way
        ours, theirs = other.classes.state_dict(), one.classes.state_dict()
        ours |= other_learner.state()["row_optimiser"]
        theirs |= one_learner.state()["row_optimiser"]
        assert one.classes.weight.dtype == (torch.bfloat16 if way == "bfloat16" else torch.float32)
        for name, values in theirs.items():
            assert torch.equal(_whole(world, ours[name].float()), values.float()), (way, name)


def check_overlapped(world: World) -> None:
    """Rows that travel while the network computes, and rows in host memory, end with the same bits."""
    for way in ("adam", "memory", "bfloat16"):
        found = []
        for host, overlapped in ((None, False), (None, True), (Host(3), True), (Host(9), False)):
            model, learner = made(world, way, CLASSES, sharded=True, host=host)
            assert isinstance(model.classes, ShardedClassEmbeddings)
            model.classes._owners = replace(model.classes._owners, overlapped=overlapped)
            losses = _learn(world, learner, 0, 4, ahead=overlapped)
            rows = {**model.classes.state_dict(), **learner.state()["row_optimiser"]}
            found.append((losses, {name: values.clone() for name, values in rows.items()}))
        for losses, rows in found[1:]:
            assert losses == found[0][0]
            assert all(torch.equal(values, found[0][1][name]) for name, values in rows.items())


def check_replicas(world: World) -> None:
    """Gradients that travel during the backward pass, and those that wait for its end, give the same bits."""
    for way in ("adam", "memory", "bfloat16"):
        for host in (None, Host(5)):
            found = []
            for early in (True, False):
                model, learner = made(world, way, CLASSES, sharded=False, host=host)
                model.classes.join(world if early else World())
                losses = _learn(world, learner, 0, 4)
                assert not model.classes._expected
                rows = {**model.classes.state_dict(), **learner.state()["row_optimiser"]}
                found.append((losses, rows))
            assert found[0][0] == found[1][0]
            assert all(torch.equal(values, found[1][1][name]) for name, values in found[0][1].items())


def check_resumed(world: World, folder: Path) -> None:
    """A table saved in shards is continued whole, and the other way round, with the same bits."""
    for way in WAYS:
        straight, straight_learner = _made(world, way, sharded=True)
        _learn(world, straight_learner, 0, 4)
        for name, sharded in (("shared", False), ("whole", True), ("shared", True)):
            model, learner = _made(world, way, sharded=sharded)
            _load(folder / way / f"{name}.npz", model, learner)
            _learn(world, learner, 2, 4)
            rows = model.classes.weight.detach()
            expected = straight.classes.weight.detach()
            assert torch.equal(rows[straight.classes.kept] if not sharded else rows, expected), (way, name)


def check_start(world: World) -> None:
    """First rows from features: as many batches as each process has."""
    torch.manual_seed(world.rank)
    batches = [(torch.randn(3, 4, 1, 2), torch.randint(0, 9, (3,))) for _ in range(1 + 2 * world.rank)]
    torch.manual_seed(7)
    one = ClassEmbeddings(10, 4, 1, 2, "memory")
    torch.manual_seed(7)
    other = ShardedClassEmbeddings(world, 10, 4, 1, 2, "memory")
    one.start_from(world, batches)
    other.start_from(world, batches)
    torch.testing.assert_close(_whole(world, other.weight.detach()), one.weight.detach())
    assert torch.equal(_whole(world, other.seen.int()), one.seen.int())
    kept = other.kept
    assert other.absent(kept).tolist() == one.absent(kept).tolist()


def _load(path: Path, model: Model, learner: Learner) -> None:
    tree = shards.load(path)
    shards.restore_rows(path, tree, model.classes, learner.state()["row_optimiser"])
    model.load_state_dict(tree["model"])
    learner.restore(tree["learner"])


def _check_shares(path: Path, way: str, size: int, whole: dict[str, torch.Tensor]) -> None:
    """Any number of processes can each take its share of a checkpoint."""
    keeping, optimiser = WAYS[way]
    rows = whole["sparse.classes.weight"]
    for rank in range(size):
        world = World(rank=rank, size=size, local_size=size)
        table = ShardedClassEmbeddings(world, *rows.shape, keeping, rows.dtype)  # type: ignore[arg-type, call-arg]
        state = {} if keeping == "memory" else table.optimiser(optimiser).state_dict()  # type: ignore[arg-type]
        tree = shards.load(path)
        shards.restore_rows(path, tree, table, state)
        for name, values in {**tree["model"], **state}.items():
            if name in state or name.startswith("sparse.classes"):
                assert torch.equal(values, whole[name][table.kept]), name


def test_three_processes_then_one(tmp_path: Path) -> None:
    printed = run_together("tests.trainer.test_sharded", str(tmp_path), size=3, seconds=300)
    assert printed.count("all passed") == 3
    for way in WAYS:
        files = sorted(path.name for path in (tmp_path / way).iterdir())
        assert files == [*(f"shared-2-{rank}-of-3.npz" for rank in range(3)), "shared.npz", "whole.npz"]
        whole, learner = _made(World(), way, sharded=False)
        shared, other = _made(World(), way, sharded=True)
        _load(tmp_path / way / "whole.npz", whole, learner)
        _load(tmp_path / way / "shared.npz", shared, other)
        for size in (1, 2, 5):
            saved = {**whole.state_dict(), **learner.state()["row_optimiser"]}
            _check_shares(tmp_path / way / "shared.npz", way, size, saved)
        for name, values in {**whole.state_dict(), **learner.state()["row_optimiser"]}.items():
            assert torch.equal({**shared.state_dict(), **other.state()["row_optimiser"]}[name], values), name
        assert _learn(World(), learner, 2, 4) == _learn(World(), other, 2, 4)


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    model, learner = _made(World(), "adam", sharded=True)
    path = tmp_path / "c.npz"
    shards.save(path, _tree(model, learner), 1, World(), model.classes)
    (tmp_path / "c-1-0-of-1.npz").unlink()
    with pytest.raises(ValueError, match=r"c\.npz is not .*: c-1-0-of-1\.npz is not beside it"):
        _load(path, model, learner)
    shards.save(path, _tree(model, learner), 1, World(), model.classes)
    tree = shards.load(path)
    tree["shards"] *= 2
    with pytest.raises(ValueError, match=r"62 rows of sparse\.classes\.weight for classes 0 to 31"):
        shards.restore_rows(path, tree, model.classes, learner.state()["row_optimiser"])


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    model, learner = _made(World(), "adam", sharded=True)
    path = tmp_path / "c.npz"
    shards.save(path, _tree(model, learner), 1, World(), model.classes)
    shard = tmp_path / "c-1-0-of-1.npz"
    content = bytearray(shard.read_bytes())
    content[content.index(model.classes.weight[20].detach().numpy().tobytes())] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"c-1-0-of-1\.npz is not a checkpoint that can be read.*CRC"):
        _load(path, model, learner)


def test_noise_does_not_depend_on_the_share() -> None:
    shape = (3 * NOISE_BLOCK - 5, 3, 1, 1)

    def drawn(first: int, last: int) -> torch.Tensor:
        torch.manual_seed(3)
        table = torch.empty(last - first, *shape[1:])
        draw_noise(table, slice(first, last), shape[0])
        return table

    whole = drawn(0, shape[0])
    assert whole.std().item() == pytest.approx(3**-0.5, rel=0.05)
    assert len(set(whole.flatten().tolist())) > 0.99 * whole.numel()
    for first, last in ((0, 7), (5, NOISE_BLOCK), (NOISE_BLOCK - 1, NOISE_BLOCK + 1), (100, shape[0])):
        assert torch.equal(drawn(first, last), whole[first:last])


def test_rows_kept_elsewhere_are_refused() -> None:
    second = World(rank=1, size=2, local_rank=1, local_size=2)
    table = ShardedClassEmbeddings(second, 9, 2, 1, 1)
    assert table.kept == slice(5, 9)
    assert torch.equal(table.rows(slice(6, 8)), table.weight.detach()[1:3])
    with pytest.raises(
        ValueError, match="classes 4 to 8 are not all kept by this process, which keeps 5 to 9"
    ):
        table.rows(slice(4, 8))
    with pytest.raises(ValueError, match="2 classes cannot be shared among 3 processes"):
        ShardedClassEmbeddings(World(rank=1, size=3, local_rank=1, local_size=3), 2, 2, 1, 1)


def test_rows_read_twice_in_a_step() -> None:
    table = ShardedClassEmbeddings(World(), 6, 2, 1, 1)
    for candidates in ([[1, 3, -1]], [[3, 5, 1]]):
        rows, places = table.read(torch.tensor(candidates))
        assert places.max() < len(rows)
        index = places.clamp_min(0)
        weights = (places >= 0).float()[..., None, None, None]
        gradient = torch.zeros_like(rows).index_add_(0, index[0], weights.expand(-1, -1, 2, 1, 1)[0])
        rows.grad = gradient.to_sparse(1)
    found = table.take_gradient(World())
    assert found is not None
    assert found.ids.tolist() == [1, 3, 5]
    assert found.values[:, 0, 0, 0].tolist() == [2, 2, 1]
    assert table.take_gradient(World()) is None


@pytest.mark.parametrize("way", ["adam", "memory"])
def test_rows_travel_while_the_network_computes(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []

    def noted(name: str) -> None:
        original = getattr(Errand, name)

        def note(*given: Any) -> Any:
            events.append(name)
            return original(*given)

        monkeypatch.setattr(Errand, name, note)

    noted("fetch")
    noted("send_home")
    model, learner = _made(World(), way, sharded=True)
    model.backbone.register_forward_hook(lambda *_: events.append("features"))
    first = next(model.backbone.parameters())
    first.register_post_accumulate_grad_hook(lambda _: events.append("end of backward"))  # type: ignore[no-untyped-call]
    _learn(World(), learner, 0, 3)
    # The first step fetches its own rows, each but the last those of the next one, right after its update.
    step = ["features", "send_home", "end of backward"]
    assert events == ["fetch", *step, "fetch", *step, "fetch", *step]


def test_other_rows_than_expected_are_refused() -> None:
    table = ShardedClassEmbeddings(World(), 6, 2, 1, 1)
    table.expect(torch.tensor([1]), torch.tensor([[3, -1]]))
    with pytest.raises(ValueError, match="reads other classes than `expect` has announced"):
        table.read(torch.tensor([[1, 4]]))


def _all_checks(world: World, folder: Path) -> Iterator[str]:
    check_swap(world)
    yield "swap"
    check_start(world)
    yield "start"
    check_same_bits(world, folder)
    yield "same bits"
    check_overlapped(world)
    yield "overlapped"
    check_replicas(world)
    yield "replicas"
    barrier(world)
    check_resumed(world, folder)
    yield "resumed"


if __name__ == "__main__":
    table.SMALL_ROW_BYTES = 0  # whole tables are read in place
    with join_world("cpu") as joined:
        print("\n".join([*_all_checks(joined, Path(sys.argv[1])), "all passed"]), flush=True)
    end_process(0)


@pytest.mark.parametrize("wrong", [-2, 10, 15])
@pytest.mark.parametrize("way", ["device", "host", "sharded"])
def test_neighbours_that_are_no_classes_are_named(way: str, wrong: int) -> None:
    """Such as those of another run."""
    shape = (10, 4, 2, 2)
    host = Host(4) if way == "host" else None
    classes = (
        ShardedClassEmbeddings(World(), *shape) if way == "sharded" else ClassEmbeddings(*shape, host=host)
    )
    matcher = SparseQAConv(*shape, classes=classes)
    with pytest.raises(ValueError, match=rf"must lie in \[-1, 9\], found {wrong}"):
        matcher(torch.randn(2, 4, 2, 2), torch.tensor([0, 1]), torch.tensor([[1, wrong], [2, 3]]))
