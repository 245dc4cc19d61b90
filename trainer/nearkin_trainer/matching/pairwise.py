"""All probes against all gallery maps, in blocks of bounded memory.

B probes, G gallery maps, C channels, P and Q locations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nearkin_trainer.matching.operation import location_maxima

BLOCK_PROBES = 64
BLOCK_GALLERY = 64


@dataclass(frozen=True)
class PairBlock:
    """Maxima [b, g, P + Q] of the probes `rows` against the gallery maps `columns`."""

    rows: slice
    columns: slice
    maxima: Tensor


def pairwise_blocks(probes: Tensor, gallery: Tensor, *, backend: str = "auto") -> Iterator[PairBlock]:
    """Every pair of maps once, block by block."""
    for columns in _slices(len(gallery), BLOCK_GALLERY):
        for rows in _slices(len(probes), BLOCK_PROBES):
            yield PairBlock(rows, columns, pairwise_maxima(probes[rows], gallery[columns], backend=backend))


def pairwise_maxima(probes: Tensor, gallery: Tensor, *, backend: str = "auto") -> Tensor:
    """Maxima [B, G, P + Q] of all pairs of two sets of maps; gradients of both are dense."""
    everyone = torch.arange(len(gallery), device=probes.device).expand(len(probes), -1)
    return location_maxima(probes, gallery, everyone, backend, sparse_gradient=False)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
