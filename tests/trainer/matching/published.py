"""The published QAConv module in our own words: every pair by one einsum."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Published(nn.Module):
    """`doubled`: one Linear(2·h·w → 1) over both directions, as before version 1.3."""

    def __init__(self, locations: int, *, doubled: bool = False) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(1)
        self.fc = nn.Linear(2 * locations if doubled else locations, 1)
        self.logit_bn = nn.BatchNorm1d(1)

    def forward(self, probes: Tensor, gallery: Tensor) -> Tensor:
        """[P, G] scores of maps [P, C, H, W] and [G, C, H, W]."""
        sims = torch.einsum(
            "acp,bcq->abpq", F.normalize(probes.flatten(2), dim=1), F.normalize(gallery.flatten(2), dim=1)
        )
        both = torch.cat([sims.amax(dim=3), sims.amax(dim=2)], dim=2)
        rows = self.bn(both.reshape(-1, 1, self.fc.in_features))
        parts = self.fc(rows.squeeze(1)).reshape(len(probes) * len(gallery), -1)
        scores: Tensor = self.logit_bn(parts.sum(dim=1, keepdim=True)).reshape(len(probes), len(gallery))
        return scores


def shaken(module: Published, seed: int) -> Published:
    """Give every parameter and running statistic a value of its own, variances positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in module.state_dict().items():
            if values.is_floating_point():
                noise = torch.rand(values.shape, generator=generator, dtype=values.dtype)
                values.copy_(noise + 0.2 if "var" in name else noise - 0.3)
    return module
