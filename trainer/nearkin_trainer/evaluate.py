"""Judging features the way person re-identification does: every query ranks the gallery.

For a query, gallery images of the same class taken by the same camera are left out (they would be too easy),
and so are junk images and the query image itself. rank-r is the share of queries with a right image among
the first r; AP is the mean, over a query's right images, of the precision at their places; mAP is its mean
over queries. Queries whose class no remaining gallery image has are left out and counted.

Scores are computed for a block of queries at a time: memory holds the features and `[block, gallery]` scores.

Legend: Q queries, G gallery images, b queries of a block, C channels, H x W feature map.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from nearkin_trainer.data.values import JUNK, NO_CAMERA, ImageList
from nearkin_trainer.distributed import World, gather_rows
from nearkin_trainer.matching import QAConv

logger = logging.getLogger("nearkin.trainer.evaluate")

BLOCK = 64

Scores = Callable[[torch.Tensor], torch.Tensor]
"""Features of b queries `[b, C, H, W]` to scores against the whole gallery `[b, G]`; higher is more alike."""


@dataclass(frozen=True)
class Retrieval:
    """How well queries find their class; shares from 0 to 1, NaN when no query could be judged."""

    rank1: float
    rank5: float
    rank10: float
    mAP: float  # noqa: N815 - the literature's spelling
    queries: int
    left_out: int

    @classmethod
    def of_nothing(cls, left_out: int = 0) -> Self:
        """When no query could be judged."""
        return cls(math.nan, math.nan, math.nan, math.nan, 0, left_out)


@dataclass(frozen=True)
class Identities:
    """Of each image its class, its camera, and a number that tells the same file again; int64."""

    labels: torch.Tensor
    cameras: torch.Tensor
    images: torch.Tensor

    def __getitem__(self, which: slice) -> "Identities":
        return Identities(self.labels[which], self.cameras[which], self.images[which])

    def __len__(self) -> int:
        return len(self.labels)


def identities(query: ImageList, gallery: ImageList) -> tuple[Identities, Identities]:
    """Of queries and gallery; an image in both has the same number in both."""
    number = {path: i for i, path in enumerate(dict.fromkeys((*query.paths, *gallery.paths)))}

    def of(images: ImageList) -> Identities:
        numbers = np.array([number[path] for path in images.paths], dtype=np.int64)
        arrays = (images.labels, images.cameras, numbers)
        return Identities(*(torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)) for a in arrays))

    return of(query), of(gallery)


def retrieve(
    world: World,
    query_features: torch.Tensor,
    query: Identities,
    gallery: Identities,
    scores: Scores,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Retrieval:
    """Ranks the gallery for every query; the processes of a job take a share of the queries each.

    Args:
        world: the job.
        query_features: `[Q, ...]`, the same on every process.
        query: who is on the query images.
        gallery: who is on the gallery images.
        scores: what ranks the gallery.
        progress: told how many queries are done, now and then.

    Raises:
        ValueError: a score is NaN.
    """
    mine = world.share(len(query))
    results = [torch.empty(0, 2, dtype=torch.float64)]
    for start in range(mine.start, mine.stop, BLOCK):
        block = slice(start, min(start + BLOCK, mine.stop))
        scores_bG = scores(query_features[block])
        if scores_bG.isnan().any():
            raise ValueError("a score is NaN: the model has diverged; lower the learning rate")
        results.append(first_hit_and_precision(scores_bG.cpu(), query[block], gallery))
        progress(block.stop - block.start)
    return _summary(torch.cat(gather_rows(world, torch.cat(results))))


def first_hit_and_precision(scores_bG: torch.Tensor, query: Identities, gallery: Identities) -> torch.Tensor:
    """First right image's place (from 0) and average precision of each query, float64 `[b, 2]`.

    Both are -1 where no right image is counted. Equal scores keep the gallery's order.
    """
    if not len(gallery):
        return torch.full((len(query), 2), -1.0, dtype=torch.float64)
    same_class = query.labels[:, None] == gallery.labels
    same_camera = (query.cameras[:, None] == gallery.cameras) & (gallery.cameras != NO_CAMERA)
    same_image = query.images[:, None] == gallery.images
    counted = ~(same_class & same_camera | same_image | (gallery.labels == JUNK))
    order = scores_bG.masked_fill(~counted, -torch.inf).argsort(dim=1, descending=True, stable=True)
    # What is not counted may tie with a score of -inf: it gets no place rather than the last places.
    counted = counted.gather(1, order)
    right = same_class.gather(1, order) & counted
    places = counted.cumsum(1).double()
    hits = right.cumsum(1).double()
    precision = torch.where(right, hits / places.clamp_min(1), 0.0).sum(1) / hits[:, -1:].squeeze(
        1
    ).clamp_min(1)
    first = places.gather(1, right.int().argmax(1, keepdim=True)).squeeze(1) - 1
    judged = right.any(1)
    return torch.stack([torch.where(judged, first, -1.0), torch.where(judged, precision, -1.0)], 1)


def _summary(results: torch.Tensor) -> Retrieval:
    first, precision = results[results[:, 0] >= 0].unbind(1)
    left_out = len(results) - len(first)
    if left_out:
        logger.info(
            "%d of %d queries have no right image in the gallery and are left out", left_out, len(results)
        )
    if not len(first):
        return Retrieval.of_nothing(left_out)
    rank1, rank5, rank10 = (float((first < r).double().mean()) for r in (1, 5, 10))
    return Retrieval(rank1, rank5, rank10, float(precision.mean()), len(first), left_out)


def qaconv_scores(head: QAConv, gallery_features: torch.Tensor, backend: str = "auto") -> Scores:
    """Scores by a QAConv head in evaluation mode; `gallery_features` `[G, C, H, W]`."""
    head = head.eval()
    return lambda query_features: head.pairwise(query_features, gallery_features, backend=backend)


def cosine_scores(gallery_features: torch.Tensor) -> Scores:
    """Scores by the cosine of whole flattened features; `gallery_features` `[G, ...]`."""
    gallery_GD = F.normalize(gallery_features.flatten(1), dim=1)
    return lambda query_features: F.normalize(query_features.flatten(1), dim=1) @ gallery_GD.T


def euclidean_scores(gallery_features: torch.Tensor) -> Scores:
    """Scores by the negative Euclidean distance; `gallery_features` `[G, ...]`."""
    gallery_GD = gallery_features.flatten(1)
    return lambda query_features: -torch.cdist(query_features.flatten(1), gallery_GD)


@torch.no_grad()
def extract(
    world: World,
    backbone: nn.Module,
    take: Callable[[np.ndarray[tuple[int], np.dtype[np.int64]]], torch.Tensor],
    count: int,
    batch: int = 128,
) -> torch.Tensor:
    """Features of images 0..count-1, float32 `[count, C, H, W]`, the same on every process.

    Args:
        world: the job; every process computes a share.
        backbone: set to evaluation mode while this runs.
        take: image numbers to float images on the backbone's device.
        count: how many images.
        batch: images at a time.
    """
    was_training = backbone.training
    backbone.eval()
    mine = world.share(count)
    starts = range(mine.start, mine.stop, batch)
    parts = [backbone(take(np.arange(s, min(s + batch, mine.stop)))).float() for s in starts]
    backbone.train(was_training)
    if not parts:  # more processes than images
        parts = [backbone.eval()(take(np.zeros(1, dtype=np.int64))).float()[:0]]
        backbone.train(was_training)
    return torch.cat(gather_rows(world, torch.cat(parts)))
