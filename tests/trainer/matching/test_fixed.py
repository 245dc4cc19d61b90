"""Products in fixed point only find what float32 measures: with and without them, every bit is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nearkin_trainer.matching import location_maxima
from nearkin_trainer.matching.cpu import backend
from nearkin_trainer.matching.cpu.instructions import HAS_VNNI
from torch import Tensor

from tests.trainer.matching.oracle import Case, gradients_of, random_case

pytestmark = pytest.mark.skipif(not HAS_VNNI, reason="this processor has no faster products in fixed point")

MAPS = [(7, 7), (8, 8), (6, 8), (4, 13), (10, 5)]


def found(case: Case) -> list[Tensor]:
    """The maxima, and what their gradients are."""
    inputs = {name: value.detach().clone().requires_grad_() for name, value in case.inputs().items()}
    maxima = location_maxima(candidates=case.candidates, backend="cpu", **inputs)  # type: ignore[arg-type]
    return [maxima.detach(), *gradients_of(maxima, case, inputs).values()]


def with_and_without(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Of each result, what it is by products in fixed point and by those of float32."""
    fixed = found(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "FIXED_CHANNELS", 1 << 40)
        return list(zip(fixed, found(case), strict=True))


def assert_same_bits(case: Case) -> None:
    for one, other in with_and_without(case):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("channels", [128, 255, 1024])
@pytest.mark.parametrize("visible", [False, True], ids=["all visible", "visibility"])
@pytest.mark.parametrize("class_map", MAPS, ids=str)
@pytest.mark.parametrize("probe_map", MAPS, ids=str)
def test_maps_of_all_shapes(
    channels: int, probe_map: tuple[int, int], class_map: tuple[int, int], visible: bool
) -> None:
    assert_same_bits(random_case((channels, *probe_map), class_map, (4, 7, 9), visible=visible))


@settings(max_examples=40, deadline=None)
@given(
    noise=st.sampled_from([0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]),
    size=st.sampled_from([1e-18, 1e-12, 1e-6, 1.0, 1e6, 1e15]),
    alike=st.integers(1, 64),
    visible=st.booleans(),
    seed=st.integers(0, 99),
)
def test_locations_that_are_nearly_alike(
    noise: float, size: float, alike: int, visible: bool, seed: int
) -> None:
    # Some of the locations of all maps are one and the same, give or take.
    case = random_case((130, 7, 7), (7, 7), (5, 6, 9), visible=visible, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(130, 1, generator=generator)
    maps = []
    for given_maps in (case.probes, case.classes):
        changed = given_maps.flatten(2).clone()
        chosen = torch.randperm(49, generator=generator)[:alike]
        changed[:, :, chosen] = one + noise * changed[:, :, chosen]
        maps.append((size * changed).view_as(given_maps))
    assert_same_bits(replace(case, probes=maps[0], classes=maps[1]))


def test_maps_with_locations_of_zeros_and_infinity() -> None:
    case = random_case((128, 7, 7), (7, 7), (6, 8, 9), visible=True)
    probes, classes = case.probes.clone(), case.classes.clone()
    probes[0], probes[1, :, 2], classes[0], classes[1, :, :, 3] = 0, 0, 0, 0
    probes[2, 5, 1, 1], classes[2, 7, 0, 0], classes[3, 0, 6, 6] = float("inf"), float("nan"), 3e19
    assert case.probe_visibility is not None
    case.probe_visibility[3], case.probe_visibility[4] = 0, 1e-20
    for one, other in with_and_without(replace(case, probes=probes, classes=classes)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_extreme_elements() -> None:
    # Units of one element: the largest numbers and sums there are in fixed point.
    case = random_case((128, 8, 8), (8, 8), (4, 6, 9))
    spikes = torch.zeros(128, 64)
    spikes[torch.arange(64) // 2, torch.arange(64)] = torch.where(torch.arange(64) % 3 == 0, -5.0, 5.0)
    probes = spikes.view(128, 8, 8).expand_as(case.probes).contiguous()
    classes = spikes.flip(1).reshape(128, 8, 8).expand_as(case.classes).contiguous()
    assert_same_bits(replace(case, probes=probes, classes=classes))
