from __future__ import annotations

import pytest
import torch
from nearkin_trainer import losses
from nearkin_trainer.losses import WeightedLosses
from nearkin_trainer.matching import SparseScores
from torch import Tensor
from torch.nn import functional as F

LABELS = torch.tensor([0, 0, 1, 1, 1, 2])


def sparse_scores(scale: float = 1.0) -> SparseScores:
    scores = scale * torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    classes = torch.arange(20).view(4, 5)
    classes[1, 3], classes[2, 1:] = -1, -1
    return SparseScores(scores.masked_fill(classes < 0, -torch.inf).requires_grad_(), classes, 20)


def pair_scores(scale: float = 1.0) -> Tensor:
    scores = scale * torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return scores.requires_grad_()


def test_softmax_is_that_of_the_scored_classes() -> None:
    sparse = sparse_scores()
    expected = [
        -F.log_softmax(row[keep], dim=0)[0] for row, keep in zip(sparse.scores, sparse.mask, strict=True)
    ]
    torch.testing.assert_close(losses.softmax_loss(sparse), torch.stack(expected).mean())


def test_focal_is_the_published_sum_over_scored_classes() -> None:
    sparse = sparse_scores()
    total = torch.zeros((), dtype=torch.float64)
    for row in range(4):
        for column in range(5):
            if sparse.mask[row, column]:
                p = torch.sigmoid(sparse.scores[row, column])
                right = p if column == 0 else 1 - p
                total = total - (1 - right) ** 2 * right.log()
    torch.testing.assert_close(losses.focal_loss(sparse), total / 4)


def test_pairwise_is_the_published_sum_over_pairs() -> None:
    scores = pair_scores()
    p = torch.sigmoid(scores)
    right = torch.where(LABELS[:, None] == LABELS, p, 1 - p)
    torch.testing.assert_close(losses.pairwise_loss(scores, LABELS), -right.log().sum() / 6)


def test_triplet_takes_the_hardest_of_each_sample() -> None:
    scores = pair_scores().detach()
    total = 0.0
    for a in range(5):  # sample 5 has no other positive
        worst = min(float(scores[a, b]) for b in range(6) if b != a and LABELS[b] == LABELS[a])
        best = max(float(scores[a, b]) for b in range(6) if LABELS[b] != LABELS[a])
        total += max(best - worst + 16, 0)
    assert float(losses.triplet_loss(scores, LABELS)) == pytest.approx(total / 5)


def test_batch_softmax_sets_each_positive_against_the_negatives() -> None:
    scores = pair_scores()
    means = []
    for a in range(5):
        others = scores[a][LABELS[a] != LABELS]
        positives = [b for b in range(6) if b != a and LABELS[b] == LABELS[a]]
        terms = [-F.log_softmax(torch.cat([scores[a, b][None], others]), dim=0)[0] for b in positives]
        means.append(torch.stack(terms).mean())
    torch.testing.assert_close(losses.batch_softmax_loss(scores, LABELS), torch.stack(means).mean())


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("name", sorted(losses.SPARSE_LOSSES))
def test_sparse_losses_stay_finite_and_pass_nothing_to_masked(name: str, scale: float) -> None:
    sparse = sparse_scores(scale)
    loss = losses.SPARSE_LOSSES[name](sparse)
    torch.autograd.backward(loss)
    assert loss.isfinite()
    assert sparse.scores.grad is not None
    assert sparse.scores.grad.isfinite().all()
    assert not sparse.scores.grad[~sparse.mask].any()


@pytest.mark.parametrize(
    "labels", [LABELS, torch.zeros(6), torch.arange(6)], ids=["mixed", "one class", "all differ"]
)
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("name", sorted(losses.BATCH_LOSSES))
def test_batch_losses_stay_finite(name: str, scale: float, labels: Tensor) -> None:
    scores = pair_scores(scale)
    loss = losses.BATCH_LOSSES[name](scores, labels)
    torch.autograd.backward(loss)
    assert loss.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_weighted_sum_reports_its_parts() -> None:
    weighted = WeightedLosses(softmax=0.5, triplet=2.0)
    sparse, pairs = sparse_scores(), pair_scores()
    total, parts = weighted(sparse, pairs, LABELS)
    assert set(parts) == {"softmax", "triplet"}
    torch.testing.assert_close(total, 0.5 * parts["softmax"] + 2.0 * parts["triplet"])
    assert weighted.needs_sparse
    assert weighted.needs_pairs


def test_weighted_losses_say_what_they_lack() -> None:
    assert not WeightedLosses(focal=1.0).needs_pairs
    with pytest.raises(ValueError, match=r"focal loss has weight 1\.0 and needs sparse"):
        WeightedLosses(focal=1.0)(pairs=pair_scores(), labels=LABELS)
    with pytest.raises(ValueError, match=r"triplet loss has weight 1\.0 and needs pairs"):
        WeightedLosses(triplet=1.0)(sparse_scores())
    with pytest.raises(ValueError, match="pairwise must be a finite weight"):
        WeightedLosses(pairwise=-1.0)
    with pytest.raises(ValueError, match="must have a weight above 0"):
        WeightedLosses()
