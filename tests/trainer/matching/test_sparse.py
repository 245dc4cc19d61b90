from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nearkin_trainer.matching import SparseQAConv, SparseScores, location_maxima
from torch import Tensor

LABELS = torch.tensor([4, 0, 4])
NEIGHBOURS = torch.tensor([[3, 1], [2, -1], [4, 5]], dtype=torch.int32)


def test_own_class_first_then_neighbours() -> None:
    matcher = SparseQAConv(6, 5, 2, 3).eval()
    features = torch.randn(3, 5, 2, 3)
    sparse = matcher(features, LABELS, NEIGHBOURS)
    # The third sample's first neighbour is its own class, which is left out.
    assert sparse.classes.tolist() == [[4, 3, 1], [0, 2, -1], [4, -1, 5]]
    assert torch.equal(sparse.scores.isneginf(), ~sparse.mask)
    every = matcher.head(location_maxima(features, matcher.table, torch.arange(6).expand(3, -1)))
    expected = every.gather(1, sparse.classes.clamp_min(0))
    torch.testing.assert_close(sparse.scores[sparse.mask], expected[sparse.mask])


def test_the_whole_table_or_the_rows_of_the_batch() -> None:
    matcher = SparseQAConv(6, 5, 2, 3).eval()
    features, table = torch.randn(3, 5, 2, 3), torch.randint(-1, 6, (6, 4))
    whole, rows = matcher(features, LABELS, table), matcher(features, LABELS, table[LABELS])
    assert torch.equal(whole.classes, rows.classes)
    assert torch.equal(whole.scores, rows.scores)


def test_a_table_as_the_client_returns_it() -> None:
    matcher = SparseQAConv(6, 5, 2, 3).eval()
    features, table = torch.randn(3, 5, 2, 3), np.random.default_rng(0).integers(-1, 6, (6, 4), np.int32)
    table.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = matcher(features, LABELS, table)
    assert torch.equal(whole.classes, matcher(features, LABELS, torch.tensor(table)).classes)


@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray], ids=["tensor", "array"])
def test_as_many_samples_as_classes(kind: Callable[[np.ndarray[Any, Any]], Any]) -> None:
    matcher = SparseQAConv(3, 5, 2, 3).eval()
    features, table = torch.randn(3, 5, 2, 3), kind(np.array([[1, 2], [2, 0], [0, 1]]))
    labels = torch.tensor([2, 2, 0])
    with pytest.raises(ValueError, match="one_row_per='sample' or one_row_per='class'"):
        matcher(features, labels, table)
    whole = matcher(features, labels, table, one_row_per="class")
    assert whole.classes.tolist() == [[2, 0, 1], [2, 0, 1], [0, 1, 2]]
    rows = matcher(features, labels, table, one_row_per="sample")
    assert rows.classes.tolist() == [[2, 1, -1], [2, -1, 0], [0, -1, 1]]
    either = matcher(features, torch.arange(3), table)  # both readings say the same
    assert either.classes.tolist() == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]


def test_dense_scores_have_the_fill_elsewhere() -> None:
    sparse = SparseScores(torch.tensor([[1.0, 2.0, -torch.inf]]), torch.tensor([[3, 0, -1]]), num_classes=5)
    assert sparse.to_dense(fill=-9.0).tolist() == [[2.0, -9.0, -9.0, 1.0, -9.0]]


def test_the_class_gradient_holds_touched_rows_only() -> None:
    matcher = SparseQAConv(1000, 5, 2, 3)
    sparse = matcher(torch.randn(3, 5, 2, 3), LABELS, NEIGHBOURS)
    torch.autograd.backward(sparse.scores[sparse.mask].square().sum())
    gradient = matcher.table.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient.coalesce().indices().tolist() == [[0, 1, 2, 3, 4, 5]]
    before = matcher.table.detach().clone()
    optimizer: torch.optim.Optimizer = torch.optim.SparseAdam(matcher.classes.parameters())
    optimizer.step()
    changed = (matcher.table != before).flatten(1).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("labels", "neighbours", "message"),
    [
        (LABELS, NEIGHBOURS[:2], r"neighbours must be \[3, k\]"),
        (LABELS, NEIGHBOURS.double(), "neighbours must be integers"),
        (LABELS - 1, NEIGHBOURS, r"labels must lie in \[0, 5\], found -1"),
        (LABELS + 2, NEIGHBOURS, r"labels must lie in \[0, 5\], found 6"),
        (LABELS.float(), NEIGHBOURS, "labels must be int64 class ids"),
        (LABELS[:, None], NEIGHBOURS, "labels must be int64 class ids"),
    ],
)
def test_errors_name_what_is_wrong(labels: Tensor, neighbours: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseQAConv(6, 5, 2, 3)(torch.randn(3, 5, 2, 3), labels, neighbours)


def test_class_maps_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"classes.weight is \[6, 5\]"):
        SparseQAConv(6, 5, 2, 3, classes=torch.nn.Embedding(6, 5))
