"""What the sparse score is measured beside: the ways it is written in plain PyTorch.

B probes, M candidates per probe, N classes, C channels, P locations. Each takes the table as [N, C·P], so
that its gradient can be sparse where the way of writing allows it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

DENSE_BLOCK = 64  # classes scored at once; 16 is the published default, and slower here


def plain(probes_BCP: Tensor, table: Tensor, candidates_BM: Tensor) -> Tensor:
    """A loop over samples, after normalising the whole table: the reference's way."""
    units_BCP = F.normalize(probes_BCP, dim=1)
    units_NCP = F.normalize(table.view(len(table), *probes_BCP.shape[1:]), dim=1)
    return torch.stack(
        [
            maxima(torch.einsum("cp,mcq->mpq", units_CP, units_NCP[ids_M]))
            for units_CP, ids_M in zip(units_BCP, candidates_BM, strict=True)
        ]
    )


def gathered(probes_BCP: Tensor, table: Tensor, candidates_BM: Tensor) -> Tensor:
    """Index, normalise, einsum, amax, with a sparse gradient of the table."""
    units_BCP = F.normalize(probes_BCP, dim=1)
    rows = F.embedding(candidates_BM, table, sparse=True)
    units_BMCP = F.normalize(rows.view(*candidates_BM.shape, *probes_BCP.shape[1:]), dim=2)
    return maxima(torch.einsum("bcp,bmcq->bmpq", units_BCP, units_BMCP))


def dense(probes_BCP: Tensor, table: Tensor, block: int = DENSE_BLOCK) -> Tensor:
    """All classes for every sample, in blocks of classes, which may be all at once: [B, N, 2·P]."""
    units_BCP = F.normalize(probes_BCP, dim=1)
    units_NCP = F.normalize(table.view(len(table), *probes_BCP.shape[1:]), dim=1)
    return torch.cat(
        [
            maxima(torch.einsum("bcp,ncq->bnpq", units_BCP, block_nCP))
            for block_nCP in torch.split(units_NCP, block)
        ],
        dim=1,
    )


def maxima(sims: Tensor) -> Tensor:
    """Row and column maxima, in the published order."""
    return torch.cat([sims.amax(dim=-1), sims.amax(dim=-2)], dim=-1)
