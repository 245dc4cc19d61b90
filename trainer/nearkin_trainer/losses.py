"""Losses over QAConv scores: against few classes, and among the samples of a batch.

Every loss maps scores to one number, the mean over samples. Entries of −inf are classes that were not scored:
they add nothing and pass no gradient.

B samples, M = 1 + k scored classes, the own class in column 0.
Sources: focal-weighted cross-entropy, pairwise matching and batch-hard triplet are those of S. Liao and
L. Shao's QAConv (ECCV 2020; CVPR 2022), as there summed over classes or pairs and averaged over samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nearkin_trainer.matching import SparseScores

TRIPLET_MARGIN = 16.0


def softmax_loss(sparse: SparseScores) -> Tensor:
    """Cross-entropy of the own class among the scored ones."""
    own = torch.zeros(len(sparse.scores), dtype=torch.int64, device=sparse.scores.device)
    return F.cross_entropy(sparse.scores, own)


def focal_loss(sparse: SparseScores, gamma: float = 2.0) -> Tensor:
    """Binary cross-entropy of each scored class, weighted by (1 − p(right answer))^gamma (QAConv 1.x)."""
    # Masked before anything is computed: inf · 0 in the backward pass would be NaN.
    scores_BM = sparse.scores.masked_fill(~sparse.mask, 0.0)
    signs_BM = torch.full_like(scores_BM, -1.0)
    signs_BM[:, 0] = 1.0
    margins_BM = signs_BM * scores_BM
    losses_BM = torch.sigmoid(-margins_BM) ** gamma * -F.logsigmoid(margins_BM)
    return losses_BM.masked_fill(~sparse.mask, 0.0).sum(dim=1).mean()


def pairwise_loss(scores_BB: Tensor, labels_B: Tensor) -> Tensor:
    """Pairwise matching: binary cross-entropy of "same class" over all pairs, the diagonal included."""
    same_BB = _same(labels_B).to(scores_BB.dtype)
    return F.binary_cross_entropy_with_logits(scores_BB, same_BB, reduction="none").sum(dim=1).mean()


def triplet_loss(scores_BB: Tensor, labels_B: Tensor, margin: float = TRIPLET_MARGIN) -> Tensor:
    """Batch-hard triplet: the worst positive should beat the best negative by `margin` (in units of score).

    Samples without another positive or without any negative in the batch are left out of the mean.
    """
    positive_BB, negative_BB = _positives(labels_B), ~_same(labels_B)
    worst_B = scores_BB.masked_fill(~positive_BB, torch.inf).amin(dim=1)
    best_B = scores_BB.masked_fill(~negative_BB, -torch.inf).amax(dim=1)
    usable_B = positive_BB.any(dim=1) & negative_BB.any(dim=1)
    hinges = F.relu(best_B[usable_B] - worst_B[usable_B] + margin)
    return hinges.mean() if len(hinges) else scores_BB.sum() * 0.0


def batch_softmax_loss(scores_BB: Tensor, labels_B: Tensor) -> Tensor:
    """In-batch softmax: each positive against the negatives; averaged over positives, then samples.

    A sample is not compared with itself, nor are its positives made to compete with each other.
    """
    positive_BB = _positives(labels_B)
    negatives_B1 = scores_BB.masked_fill(_same(labels_B), -torch.inf).logsumexp(dim=1, keepdim=True)
    losses_BB = F.softplus(negatives_B1 - scores_BB).masked_fill(~positive_BB, 0.0)
    counts_B = positive_BB.sum(dim=1)
    usable_B = counts_B > 0
    if not usable_B.any():
        return scores_BB.sum() * 0.0
    return (losses_BB.sum(dim=1)[usable_B] / counts_B[usable_B]).mean()


SPARSE_LOSSES: dict[str, Callable[[SparseScores], Tensor]] = {"softmax": softmax_loss, "focal": focal_loss}
BATCH_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pairwise": pairwise_loss,
    "triplet": triplet_loss,
    "batch_softmax": batch_softmax_loss,
}


@dataclass(frozen=True)
class WeightedLosses:
    """A weighted sum of losses; a loss of weight 0 is not computed.

    softmax, focal: over sparse class scores.
    pairwise, triplet, batch_softmax: over the batch's pairwise scores.
    """

    softmax: float = 0.0
    focal: float = 0.0
    pairwise: float = 0.0
    triplet: float = 0.0
    batch_softmax: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in self.weights().items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} must be a finite weight of at least 0, not {weight}")
        if not any(self.weights().values()):
            raise ValueError(f"one of {', '.join(self.weights())} must have a weight above 0")

    def weights(self) -> dict[str, float]:
        """Weight by name of loss, in the order they are added."""
        return {name: getattr(self, name) for name in (*SPARSE_LOSSES, *BATCH_LOSSES)}

    @property
    def needs_sparse(self) -> bool:
        """Whether sparse class scores have to be computed."""
        return any(self.weights()[name] for name in SPARSE_LOSSES)

    @property
    def needs_pairs(self) -> bool:
        """Whether the batch's pairwise scores have to be computed."""
        return any(self.weights()[name] for name in BATCH_LOSSES)

    def __call__(
        self,
        sparse: SparseScores | None = None,
        pairs: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each loss by name (detached, unweighted) for the log.

        sparse: what `SparseQAConv` returns. pairs: [B, B] scores, `labels` [B] their classes. Either may
        be left out when none of its losses has a weight.
        """
        parts = {
            name: self._one(name, sparse, pairs, labels) for name, weight in self.weights().items() if weight
        }
        total = torch.stack([self.weights()[name] * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def _one(
        self, name: str, sparse: SparseScores | None, pairs: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        if name in SPARSE_LOSSES:
            if sparse is None:
                raise ValueError(f"the {name} loss has weight {self.weights()[name]} and needs sparse scores")
            return SPARSE_LOSSES[name](sparse)
        if pairs is None or labels is None:
            raise ValueError(f"the {name} loss has weight {self.weights()[name]} and needs pairs and labels")
        return BATCH_LOSSES[name](pairs, labels)


def _same(labels_B: Tensor) -> Tensor:
    return labels_B[:, None] == labels_B[None, :]


def _positives(labels_B: Tensor) -> Tensor:
    """Same class, but not the sample itself."""
    itself = torch.eye(len(labels_B), dtype=torch.bool, device=labels_B.device)
    return _same(labels_B) & ~itself
