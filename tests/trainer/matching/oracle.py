"""The operation in float64, one loop per pair and no tricks, with the gradients that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Inputs of one call of `location_maxima`, and the gradient its maxima receive."""

    probes: Tensor
    classes: Tensor
    candidates: Tensor
    weights: Tensor
    probe_visibility: Tensor | None = None
    class_visibility: Tensor | None = None

    def inputs(self) -> dict[str, Tensor]:
        named = {
            "probes": self.probes,
            "classes": self.classes,
            "probe_visibility": self.probe_visibility,
            "class_visibility": self.class_visibility,
        }
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Answer:
    maxima: Tensor
    gradients: dict[str, Tensor]


def random_case(
    shape: tuple[int, int, int],
    class_map: tuple[int, int],
    counts: tuple[int, int, int],
    *,
    visible: bool = False,
    seed: int = 0,
) -> Case:
    """`shape` is channels and the probe's map; `counts` are probes, candidates and classes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    (channels, *probe_map), (probes, candidates, classes) = shape, counts
    ids = torch.randint(-1, classes, (probes, candidates), generator=generator)
    places = probe_map[0] * probe_map[1] + class_map[0] * class_map[1]
    return Case(
        normal(probes, channels, *probe_map),
        normal(classes, channels, *class_map),
        ids,
        normal(probes, candidates, places),
        normal(probes, *probe_map).abs() if visible else None,
        normal(classes, *class_map).abs() if visible else None,
    )


def exact(case: Case) -> Answer:
    wide = {name: value.double().requires_grad_() for name, value in case.inputs().items()}
    maxima = exact_maxima(case, wide)
    return Answer(maxima.detach(), gradients_of(maxima, case, wide))


def exact_maxima(case: Case, wide: dict[str, Tensor]) -> Tensor:
    rows = [
        torch.stack([_pair(wide, b, int(n)) for n in case.candidates[b]])
        for b in range(len(case.candidates))
        if case.candidates.shape[1]
    ]
    return torch.stack(rows) if rows else case.weights.double()


def gradients_of(maxima: Tensor, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    total = (maxima * case.weights.to(maxima)).sum()
    if not total.requires_grad:
        return {name: torch.zeros_like(value) for name, value in inputs.items()}
    found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(inputs, (gradient.to_dense().double() for gradient in found), strict=True))


def _pair(inputs: dict[str, Tensor], b: int, n: int) -> Tensor:
    probe = _units(inputs["probes"][b], inputs.get("probe_visibility"), b)
    if n < 0:
        return probe.new_zeros(probe.shape[1] + inputs["classes"][0].flatten(1).shape[1])
    sims = probe.T @ _units(inputs["classes"][n], inputs.get("class_visibility"), n)
    return torch.cat([sims.max(dim=1).values, sims.max(dim=0).values])


def _units(maps: Tensor, visibility: Tensor | None, index: int) -> Tensor:
    flat = maps.flatten(1)
    flat = flat / flat.square().sum(dim=0).sqrt().clamp_min(1e-12)
    return flat if visibility is None else flat * visibility[index].flatten()
