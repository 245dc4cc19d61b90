"""The class table: only the rows that a step has read may change."""

import numpy as np
import pytest
import torch
from nearkin_trainer.classes import (
    ROW_OPTIMISERS,
    ClassEmbeddings,
    RowAdagrad,
    RowAdam,
    RowOptimiser,
    Rows,
    RowSGD,
    class_means,
    exchange,
    optimisers,
)
from nearkin_trainer.classes.rows import rounded
from nearkin_trainer.distributed import World
from nearkin_trainer.matching import SparseQAConv

pytestmark = pytest.mark.usefixtures("one_thread")


ALONE = World()


def test_rows_start_from_the_mean_feature_of_their_class() -> None:
    table = ClassEmbeddings(3, 4, 1, 2, "memory")
    features = torch.randn(5, 4, 1, 2)
    labels = torch.tensor([0, 2, 0, 2, 0])
    noise = table.weight[1].clone()
    table.start_from(ALONE, [(features[:2], labels[:2]), (features[2:], labels[2:])])
    normed = torch.nn.functional.normalize(features, dim=1)
    assert torch.allclose(table.weight[0], normed[[0, 2, 4]].mean(0))
    assert torch.allclose(table.weight[2], normed[[1, 3]].mean(0))
    assert torch.equal(table.weight[1], noise)
    assert table.seen.tolist() == [True, False, True]
    assert table.absent(slice(0, 3)).tolist() == [1]
    assert table.absent(slice(1, 3)).tolist() == [1]


def test_learnable_rows_are_never_absent() -> None:
    assert ClassEmbeddings(3, 4, 1, 2).absent(slice(0, 3)).tolist() == []


def test_memory_moves_rows_towards_features() -> None:
    table = ClassEmbeddings(4, 2, 1, 1, "memory")
    new = torch.ones(1, 2, 1, 1)
    table.remember(Rows(torch.tensor([3]), new), momentum=0.75)
    assert torch.equal(table.weight[3:], new)
    table.remember(Rows(torch.tensor([3]), 5 * new), momentum=0.75)
    assert torch.equal(table.weight[3:], 2 * new)
    assert table.seen.tolist() == [False, False, False, True]


def test_class_means() -> None:
    features = torch.randn(4, 3, 2, 2)
    rows = class_means(features, torch.tensor([7, 1, 7, 7]))
    normed = torch.nn.functional.normalize(features, dim=1)
    assert rows.ids.tolist() == [1, 7]
    assert torch.allclose(rows.values[1], normed[[0, 2, 3]].mean(0), atol=1e-6)


def test_exchange_alone_gives_back_what_came() -> None:
    rows = Rows(torch.tensor([1, 5]), torch.randn(2, 3, 1, 1))
    assert exchange(ALONE, rows) is rows


@pytest.mark.parametrize("name", sorted(ROW_OPTIMISERS))
def test_only_touched_rows_change(name: str) -> None:
    torch.manual_seed(0)
    table = ClassEmbeddings(20, 4, 2, 2)
    sparse = SparseQAConv(20, 4, 2, 2, classes=table)
    optimiser = ROW_OPTIMISERS[name](table.weight)
    before = table.weight.detach().clone()
    neighbours = torch.tensor([[5, 6], [6, 7], [-1, -1]])
    scores = sparse(torch.randn(3, 4, 2, 2), torch.tensor([1, 2, 3]), neighbours).scores
    scores[scores.isfinite()].square().sum().backward()
    gradient = table.take_gradient(ALONE)
    assert gradient is not None
    assert gradient.ids.tolist() == [1, 2, 3, 5, 6, 7]
    assert table.weight.grad is None
    optimiser.update(table.weight, gradient, rate=0.1)
    changed = (table.weight != before).flatten(1).any(1)
    assert torch.nonzero(changed).flatten().tolist() == [1, 2, 3, 5, 6, 7]


@pytest.mark.parametrize("name", sorted(ROW_OPTIMISERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_move_alike_in_blocks_and_at_once(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    start, ids = torch.randn(40, 8, 2, 2).to(dtype), torch.randperm(40)[:23].sort().values
    gradients = [torch.randn(23, 8, 2, 2) for _ in range(3)]
    found = []
    for rows in (1000, 4, 1):
        monkeypatch.setattr(optimisers, "BLOCK_BYTES", rows * 8 * 2 * 2 * 4)
        table = start.clone()
        optimiser = ROW_OPTIMISERS[name](table)
        for values in gradients:
            optimiser.update(table, Rows(ids, values), rate=0.1)
        found.append({"table": table, **optimiser.state_dict()})
    for other in found[1:]:
        assert all(torch.equal(other[key], values) for key, values in found[0].items())


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda t: RowSGD(t, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (RowAdam, lambda p: torch.optim.Adam(p, lr=0.1)),
    ],
)
def test_touching_every_row_is_the_ordinary_optimiser(ours: type[RowOptimiser], theirs: object) -> None:
    start = torch.randn(3, 2, 2, 2)
    table, reference = start.clone(), torch.nn.Parameter(start.clone())
    optimiser, ordinary = ours(table), theirs([reference])  # type: ignore[operator]
    for step in range(4):
        gradient = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(step))
        optimiser.update(table, Rows(torch.arange(3), gradient), rate=0.1)
        reference.grad = gradient
        ordinary.step()
    assert torch.allclose(table, reference, atol=1e-6)


def test_adagrad_keeps_one_number_per_row() -> None:
    table = torch.zeros(2, 3, 1, 1)
    optimiser = RowAdagrad(table)
    gradient = torch.tensor([3.0, 0.0, 0.0]).view(1, 3, 1, 1)
    optimiser.update(table, Rows(torch.tensor([1]), gradient), rate=1.0)
    assert optimiser.squares.tolist() == [0.0, 3.0]
    assert table[1].flatten().tolist() == pytest.approx([-3 / np.sqrt(3), 0, 0])


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes=1"):
        ClassEmbeddings(1, 2, 2, 2)


def test_bfloat16_rows_do_not_stand_still() -> None:
    """Steps far smaller than a bfloat16 place move rows as far as in float32, on average."""
    torch.manual_seed(0)
    table = ClassEmbeddings(64, 16, 2, 2, dtype=torch.bfloat16)
    optimiser = RowSGD(table.weight, momentum=0.0)
    ids = torch.arange(0, 64, 2)
    before = table.weight.detach().float()
    for _ in range(50):
        noisy = 1 + 0.1 * torch.randn(len(ids), 16, 2, 2)
        optimiser.update(table.weight, Rows(ids, noisy), rate=2e-5)
    moved = table.weight.detach().float() - before
    assert moved[ids].mean().item() == pytest.approx(-50 * 2e-5, rel=0.15)
    assert not moved[ids + 1].any()


def test_bfloat16_rows_take_float32_gradients() -> None:
    torch.manual_seed(0)
    half = ClassEmbeddings(9, 4, 2, 2, dtype=torch.bfloat16)
    wide = ClassEmbeddings(9, 4, 2, 2)
    with torch.no_grad():
        wide.weight.copy_(half.weight)
    features, labels = torch.randn(2, 4, 2, 2), torch.tensor([3, 5])
    found = []
    for table in (half, wide):
        matcher = SparseQAConv(9, 4, 2, 2, classes=table)
        matcher(features, labels, torch.tensor([[1, 8], [3, -1]])).scores[:, :2].sum().backward()
        rows = table.take_gradient(ALONE)
        assert rows is not None
        found.append(rows)
    assert found[0].values.dtype == torch.float32
    assert found[0].ids.tolist() == found[1].ids.tolist()
    assert torch.equal(found[0].values, found[1].values)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 0.0, 1.0, -2.5])
def test_rounding_keeps_what_bfloat16_can_hold(value: float) -> None:
    given = torch.full((3,), value)
    assert torch.equal(rounded(given, torch.bfloat16).float().nan_to_num(7), given.nan_to_num(7))
