"""The QAConv head: from location maxima to one score, in the published form.

    score = BatchNorm(Linear(BatchNorm(maxima)))        each BatchNorm over one channel

B probes, M candidates (or G gallery maps), L = P + Q maxima per pair.
Source: S. Liao and L. Shao, ECCV 2020 (equation 4) and CVPR 2022; the names bn, fc, logit_bn are theirs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nearkin_trainer.matching.pairwise import pairwise_blocks, pairwise_maxima

log = logging.getLogger("nearkin.trainer.matching")

SMALLEST_GAIN = 1e-3


class QAConv(nn.Module):
    """Scores pairs of maps from their location maxima.

    `fc` has the shape of version 1.3 of the published code, Linear(h·w → 1), for each direction and summed.
    `load_published` turns it into the Linear(2·h·w → 1) of earlier versions when given such weights.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        if height < 1 or width < 1:
            raise ValueError(f"height and width must be at least 1, not {height} and {width}")
        self.height, self.width = height, width
        self.bn = nn.BatchNorm1d(1)
        self.fc = nn.Linear(height * width, 1)
        self.logit_bn = nn.BatchNorm1d(1)
        nn.init.constant_(self.fc.weight, 1.0 / (height * width))
        nn.init.zeros_(self.fc.bias)

    def forward(self, maxima: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scores [B, M] float32 (float64 for float64 maxima) of `maxima` [B, M, 2·height·width].

        mask: bool [B, M], True where there is a candidate. The others score −inf and are left out of the
        batch statistics, as if they had not been asked for.
        """
        locations = 2 * self.height * self.width
        if maxima.shape[-1] != locations:
            raise ValueError(
                f"maxima must end in {locations} (2 * {self.height} * {self.width}), not {maxima.shape[-1]}"
            )
        with torch.autocast(maxima.device.type, enabled=False):
            wide = maxima.to(self.fc.weight.dtype)
            if mask is None:
                scores: Tensor = self._scores(wide.reshape(-1, locations)).view(maxima.shape[:-1])
            else:
                scores = self._masked(wide, mask)
            return scores

    def pairwise(self, probes: Tensor, gallery: Tensor, *, backend: str = "auto") -> Tensor:
        """Scores [B, G] of every probe map [B, C, H, W] against every gallery map [G, C, H, W].

        In evaluation mode this runs in blocks, so that only the scores themselves grow with B·G; they have no
        gradient.
        In training mode it is one block, because the batch statistics are those of all pairs.
        """
        if self.training:
            whole: Tensor = self(pairwise_maxima(probes, gallery, backend=backend))
            return whole
        if float(self.slopes().sum()) < 0:
            log.warning("this QAConv head scores dissimilar maps higher: its slopes sum to less than 0")
        scores = probes.new_empty(len(probes), len(gallery), dtype=self.fc.weight.dtype)
        with torch.no_grad():
            for block in pairwise_blocks(probes, gallery, backend=backend):
                scores[block.rows, block.columns] = self(block.maxima)
        return scores

    def slopes(self) -> Tensor:
        """What each of the 2·height·width maxima adds to the evaluation score, which is linear in them."""
        first, last = (
            norm.weight * torch.rsqrt(_variance(norm) + norm.eps) for norm in (self.bn, self.logit_bn)
        )
        weights = self.fc.weight.squeeze(0).repeat(2 * self.height * self.width // self.fc.in_features)
        return (weights * first * last).detach()

    @torch.no_grad()
    def keep_monotone(self) -> None:
        """Project the weights to where a better match never lowers the score; call after each optimiser step.

        The published form leaves their signs free. Against learnable class maps training can then end in a
        score of *dissimilarity*, whose loss is as low and which ranks unseen images upside down; see
        docs/MATCHING.md.
        """
        self.fc.weight.clamp_(min=0.0)
        for norm in (self.bn, self.logit_bn):
            # Not quite 0, where all gradients through the norm would vanish.
            norm.weight.clamp_(min=SMALLEST_GAIN)

    def load_published(
        self, state: Mapping[str, Tensor], *, prefix: str | None = None, gallery_first: bool = False
    ) -> None:
        """Take the weights of a published QAConv checkpoint; do so before making the optimiser.

        state: holds `bn.*`, `fc.*` and `logit_bn.*`, possibly behind a prefix and among other entries.
        prefix: what stands before those names; found by itself when there is just one.
        gallery_first: for Linear(2·h·w → 1) weights of version 1.2, whose code puts the gallery's half first.
        """
        prefix = _only_prefix(state) if prefix is None else prefix
        own = {name: state[prefix + name] for name in self.state_dict() if prefix + name in state}
        weight = own["fc.weight"]
        if weight.shape == (1, 2 * self.height * self.width):
            own["fc.weight"] = weight.roll(self.height * self.width, dims=1) if gallery_first else weight
            if self.fc.in_features != weight.shape[1]:
                self.fc = nn.Linear(weight.shape[1], 1).to(self.fc.weight)
        elif weight.shape != (1, self.height * self.width):
            raise ValueError(
                f"{prefix}fc.weight is {list(weight.shape)}; {self.height}x{self.width} maps take "
                f"[1, {self.height * self.width}] or [1, {2 * self.height * self.width}]"
            )
        self.load_state_dict(own)

    def _masked(self, maxima_BML: Tensor, mask_BM: Tensor) -> Tensor:
        scores_BM = maxima_BML.new_full(mask_BM.shape, -torch.inf)
        if not mask_BM.any():
            return scores_BM
        return scores_BM.masked_scatter(mask_BM, self._scores(maxima_BML[mask_BM]))

    def _scores(self, maxima_XL: Tensor) -> Tensor:
        normed_XL = self.bn(maxima_XL[:, None]).squeeze(1)
        parts = self.fc(normed_XL.reshape(-1, self.fc.in_features))
        summed_X1 = parts.view(len(maxima_XL), -1).sum(dim=1, keepdim=True)
        scores_X: Tensor = self.logit_bn(summed_X1).squeeze(1)
        return scores_X


def _only_prefix(state: Mapping[str, Tensor]) -> str:
    prefixes = [name.removesuffix("fc.weight") for name in state if name.endswith("fc.weight")]
    prefixes = [prefix for prefix in prefixes if prefix + "logit_bn.weight" in state]
    if len(prefixes) != 1:
        raise ValueError(
            f"state must hold one QAConv head (bn, fc, logit_bn), found prefixes {prefixes}; name one"
        )
    return prefixes[0]


def _variance(norm: nn.BatchNorm1d) -> Tensor:
    assert norm.running_var is not None
    return norm.running_var
