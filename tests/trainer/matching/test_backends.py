"""Every backend against float64: no further from it than plain PyTorch in the same dtype, give or take."""

from __future__ import annotations

import dataclasses
import logging
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nearkin_trainer.matching import location_maxima
from torch import Tensor

from tests.trainer.matching.oracle import Answer, Case, exact, exact_maxima, gradients_of, random_case

TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(not find_spec("triton"), reason="nearkin-trainer[triton] is not installed"),
)
FAST = ["cpu", TRITON]
ALL = ["plain", *FAST]
SLACK = 2e-6  # what float32 may add to the plain backend's error, relative to the largest value
SHAPES = {
    "square": ((64, 7, 7), (7, 7), (4, 5, 9)),
    "odd": ((33, 5, 3), (2, 3), (3, 4, 5)),
    "one channel": ((1, 2, 2), (2, 2), (2, 3, 4)),
    "one location": ((40, 1, 1), (1, 1), (3, 3, 6)),
    "one probe": ((17, 4, 4), (4, 4), (1, 6, 3)),
    "tall": ((24, 24, 8), (16, 8), (2, 2, 3)),
    "bigger class maps": ((20, 2, 2), (9, 9), (3, 3, 4)),
    "1,024 locations": ((8, 2, 3), (32, 32), (2, 2, 3)),
    "crowded": ((16, 3, 3), (3, 3), (9, 12, 2)),
    # Of the 49 and 51 locations, 1 and 3 are multiplied by themselves, with more than 64 of the other map.
    "many channels": ((150, 7, 7), (7, 10), (3, 4, 5)),
    "three over": ((129, 3, 17), (5, 19), (2, 3, 4)),
    # Both maps have 48 to 64 locations: multiplied in fixed point first where that is faster.
    "fixed point": ((150, 7, 7), (8, 8), (4, 5, 9)),
    "fixed point, four over": ((513, 13, 4), (7, 7), (3, 9, 4)),
}


def answer(case: Case, backend: str, **options: bool) -> Answer:
    inputs = {name: value.detach().clone().requires_grad_() for name, value in case.inputs().items()}
    maxima = location_maxima(candidates=case.candidates, backend=backend, **inputs, **options)  # type: ignore[arg-type]
    return Answer(maxima.detach(), gradients_of(maxima, case, inputs))


def error(found: Tensor, truth: Tensor, scale: float = 1.0) -> float:
    """The largest deviation, relative to the largest value or to `scale`."""
    if not truth.numel():
        return 0.0
    return float((found.double() - truth).abs().max()) / max(float(truth.abs().max()), scale)


def cancelled(case: Case, name: str) -> float:
    """The size of the terms that cancel in a gradient, which has no part along its location."""
    maps = case.inputs()[name]
    shortest = maps.float().flatten(2).norm(dim=1).min() if maps.dim() == 4 else torch.ones(())
    return float(case.weights.abs().max() / shortest) if case.weights.numel() else 1.0


def assert_as_good_as_plain(case: Case, backend: str) -> None:
    truth, plain, found = exact(case), answer(case, "plain"), answer(case, backend)
    assert found.maxima.dtype == plain.maxima.dtype
    assert error(found.maxima, truth.maxima) <= 2 * error(plain.maxima, truth.maxima) + SLACK
    for name, expected in truth.gradients.items():
        scale = cancelled(case, name)
        allowed = 2 * error(plain.gradients[name], expected, scale) + SLACK
        assert error(found.gradients[name], expected, scale) <= allowed, name


@pytest.mark.parametrize("visible", [False, True], ids=["all visible", "visibility"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_maxima_and_gradients(backend: str, shape: str, visible: bool) -> None:
    assert_as_good_as_plain(random_case(*SHAPES[shape], visible=visible), backend)


@pytest.mark.parametrize("backend", FAST)
def test_a_gradient_that_cancels_altogether(backend: str) -> None:
    # A map of one channel has no direction but its sign: all that many maxima add up is taken off again.
    case = random_case((1, 24, 8), (11, 9), (5, 5, 2), visible=True, seed=5280)
    assert_as_good_as_plain(case, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", FAST)
def test_half_precision_maps_are_multiplied_in_float32(backend: str, dtype: torch.dtype) -> None:
    case = random_case((48, 4, 4), (4, 4), (3, 4, 6))
    assert_as_good_as_plain(dataclasses.replace(case, classes=case.classes.to(dtype)), backend)
    assert_as_good_as_plain(dataclasses.replace(case, probes=case.probes.to(dtype)), backend)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=8, deadline=None)
@given(
    channels=st.integers(1, 70),
    maps=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6)),
    counts=st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_any_shape(
    backend: str,
    channels: int,
    maps: tuple[int, int, int, int],
    counts: tuple[int, int, int],
    seed: int,
) -> None:
    case = random_case((channels, maps[0], maps[1]), (maps[2], maps[3]), counts, seed=seed)
    assert_as_good_as_plain(case, backend)


@pytest.mark.parametrize("backend", FAST)
def test_maxima_that_bfloat16_cannot_tell_apart(backend: str) -> None:
    # All locations nearly alike: sims differ in the fifth digit, bfloat16 products in the third.
    case = random_case((64, 5, 5), (5, 5), (3, 4, 6))
    close = torch.randn(64)[None, :, None, None]
    case = dataclasses.replace(case, probes=close + 0.01 * case.probes, classes=close + 0.01 * case.classes)
    # Which of two locations that float32 cannot tell apart either gets the gradient is a matter of chance.
    truth, plain, found = exact(case), answer(case, "plain"), answer(case, backend)
    assert error(found.maxima, truth.maxima) <= 2 * error(plain.maxima, truth.maxima) + SLACK


@pytest.mark.parametrize("backend", ALL)
def test_the_first_of_equal_locations_gets_the_gradient(backend: str) -> None:
    probes, classes = torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    weights = torch.zeros(1, 1, 8)
    weights[0, 0, 3] = 1.0  # the last probe location's best class location
    visibility = torch.ones(1, 2, 2)
    case = Case(probes, classes, torch.zeros(1, 1, dtype=torch.int64), weights, visibility, visibility)
    gradients = answer(case, backend).gradients
    assert gradients["class_visibility"].flatten().tolist() == pytest.approx([1.0, 0.0, 0.0, 0.0])
    assert gradients["probe_visibility"].flatten().tolist() == pytest.approx([0.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize("channels", [37, 150])
@pytest.mark.parametrize("places", [(2, 3), (7, 7), (5, 10)], ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_equal_locations_have_equal_sims_wherever_they_lie(
    backend: str, places: tuple[int, int], channels: int
) -> None:
    # 49 locations are 48 and one more to the processor, whose products take another way.
    torch.manual_seed(0)
    maps = torch.randn(1, channels, 1, 1).expand(1, channels, *places).contiguous()
    visibility = torch.ones(1, *places)
    weights = torch.ones(1, 1, 2 * places[0] * places[1])
    case = Case(maps, maps.clone(), torch.zeros(1, 1, dtype=torch.int64), weights, visibility, visibility)
    found = answer(case, backend)
    assert len(set(found.maxima.flatten().tolist())) == 1
    locations = places[0] * places[1]
    for name in ("class_visibility", "probe_visibility"):
        shares = found.gradients[name].flatten()
        # The first gets all maxima of the other map, and each the one that is its own.
        expected = torch.ones_like(shares)
        expected[0] += locations
        torch.testing.assert_close(shares, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ALL)
def test_nan_spreads_to_what_it_touches_and_no_further(backend: str, value: float) -> None:
    case = random_case((6, 2, 2), (2, 2), (2, 2, 3))
    ids = torch.tensor([[0, 1], [1, 2]])
    classes = case.classes.clone()
    classes[1, 4, 0, 1] = value
    found = location_maxima(case.probes, classes, ids, backend)
    assert found[0, 1, :4].isnan().all()
    assert found[0, 1, 4:].isnan().tolist() == [False, True, False, False]
    clean = location_maxima(case.probes, case.classes, ids, backend)
    torch.testing.assert_close(found[0, 0], clean[0, 0])
    torch.testing.assert_close(found[1, 1], clean[1, 1])
    torch.testing.assert_close(found[0, 1, 4:][[0, 2, 3]], clean[0, 1, 4:][[0, 2, 3]])


@pytest.mark.parametrize("backend", ALL)
def test_zero_locations_score_zero_and_pass_finite_gradients(backend: str) -> None:
    case = random_case((5, 2, 2), (2, 2), (2, 2, 3))
    case.probes[0, :, 0, 0] = 0
    case.classes[:, :, 1, 1] = 0
    found = answer(case, backend)
    assert found.maxima.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in found.gradients.values())


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("backend", ALL)
def test_the_class_gradient_is_sparse_over_touched_rows(backend: str, sparse: bool) -> None:
    case = random_case((5, 2, 2), (2, 2), (2, 3, 50))
    classes = case.classes.requires_grad_()
    ids = torch.tensor([[7, 7, -1], [49, 0, 7]])
    total = location_maxima(case.probes, classes, ids, backend, sparse_gradient=sparse).sum()
    (gradient,) = torch.autograd.grad(total, [classes])
    assert gradient.is_sparse == sparse
    touched = gradient.coalesce().indices()[0] if sparse else gradient.flatten(1).any(dim=1).nonzero()[:, 0]
    assert touched.tolist() == [0, 7, 49]


@pytest.mark.parametrize("counts", [(3, 0, 4), (0, 3, 4)], ids=["no candidates", "no probes"])
@pytest.mark.parametrize("backend", ALL)
def test_empty(backend: str, counts: tuple[int, int, int]) -> None:
    found = answer(random_case((5, 2, 2), (2, 3), counts), backend)
    assert found.maxima.shape == (*counts[:2], 10)
    assert not any(gradient.any() for gradient in found.gradients.values())


@pytest.mark.parametrize("backend", ALL)
def test_no_probes_can_be_differentiated(backend: str) -> None:
    maxima = location_maxima(
        torch.zeros(0, 5, 2, 2, requires_grad=True), torch.ones(4, 5, 2, 2), torch.zeros(0, 3).long(), backend
    )
    torch.autograd.backward(maxima.sum())


@pytest.mark.parametrize("backend", ALL)
def test_autocast_leaves_the_products_alone(backend: str) -> None:
    case = random_case((48, 4, 4), (4, 4), (3, 4, 6))
    expected = answer(case, backend).maxima
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = answer(case, backend).maxima
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_the_result_may_be_changed_in_place(backend: str) -> None:
    case = random_case((16, 2, 3), (2, 3), (2, 3, 4))
    probes = case.probes.clone().requires_grad_()
    maxima = location_maxima(probes, case.classes, case.candidates, backend)
    torch.autograd.backward(maxima.mul_(2).sum())
    same = case.probes.clone().requires_grad_()
    torch.autograd.backward(location_maxima(same, case.classes, case.candidates, backend).sum() * 2)
    torch.testing.assert_close(probes.grad, same.grad)


@pytest.mark.parametrize("backend", ALL)
def test_nobody_has_a_candidate(backend: str) -> None:
    case = dataclasses.replace(
        random_case((5, 2, 2), (2, 3), (2, 3, 4)), candidates=torch.full((2, 3), -1, dtype=torch.int64)
    )
    found = answer(case, backend)
    assert not found.maxima.any()
    assert not any(gradient.any() for gradient in found.gradients.values())


@pytest.mark.parametrize("backend", ALL)
def test_maps_that_are_not_contiguous(backend: str) -> None:
    case = random_case((16, 4, 4), (4, 4), (3, 4, 6))
    strided = dataclasses.replace(
        case,
        probes=case.probes.to(memory_format=torch.channels_last),
        classes=case.classes.to(memory_format=torch.channels_last),
    )
    one, other = answer(case, backend), answer(strided, backend)
    torch.testing.assert_close(one.maxima, other.maxima)
    for name, gradient in one.gradients.items():
        torch.testing.assert_close(gradient, other.gradients[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_the_same_input_gives_the_same_bits(backend: str) -> None:
    case = random_case((32, 5, 5), (5, 5), (6, 7, 9))
    one, other = answer(case, backend), answer(case, backend)
    assert torch.equal(one.maxima, other.maxima)
    assert all(torch.equal(one.gradients[name], other.gradients[name]) for name in one.gradients)


def test_plain_gradients_by_finite_differences() -> None:
    case = random_case((3, 2, 2), (1, 3), (2, 2, 3), visible=True)
    inputs = {name: value.double().requires_grad_() for name, value in case.inputs().items()}

    def maxima(*values: Tensor) -> Tensor:
        named = dict(zip(inputs, values, strict=True))
        return location_maxima(
            candidates=case.candidates,
            backend="plain",
            sparse_gradient=False,
            **named,
        )

    assert torch.autograd.gradcheck(maxima, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(maxima, tuple(inputs.values()))


@pytest.mark.parametrize("sparse", [True, False])
def test_plain_has_second_derivatives(sparse: bool) -> None:
    case = random_case((5, 2, 2), (2, 2), (2, 3, 4))

    def penalised(backend: str | None) -> dict[str, Tensor]:
        wide = {name: value.double().requires_grad_() for name, value in case.inputs().items()}
        maxima = exact_maxima(case, wide)
        if backend is not None:
            maxima = location_maxima(
                candidates=case.candidates, backend=backend, sparse_gradient=sparse, **wide
            )
        firsts = torch.autograd.grad(maxima.sum(), list(wide.values()), create_graph=True)
        penalty = torch.stack([first.to_dense().square().sum() for first in firsts]).sum()
        seconds = torch.autograd.grad(penalty, list(wide.values()))
        return dict(zip(wide, (second.to_dense() for second in seconds), strict=True))

    for found, expected in zip(penalised("plain").values(), penalised(None).values(), strict=True):
        assert torch.allclose(found, expected)


@pytest.mark.parametrize("of", ["probes", "classes"])
@pytest.mark.parametrize("backend", FAST)
def test_a_penalty_on_gradients_is_refused_and_not_forgotten(backend: str, of: str) -> None:
    case = random_case((5, 2, 2), (2, 2), (2, 3, 4))
    inputs = {name: value.requires_grad_() for name, value in case.inputs().items()}
    maxima = location_maxima(candidates=case.candidates, backend=backend, **inputs)  # type: ignore[arg-type]
    (first,) = torch.autograd.grad(maxima.sum(), inputs[of], create_graph=True)
    loss = maxima.sum() + first.to_dense().square().sum()
    with pytest.raises(RuntimeError, match=r"first derivatives only; .* backend='plain'"):
        torch.autograd.grad(loss, inputs["probes"], retain_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_auto_says_what_it_chose_and_why(caplog: pytest.LogCaptureFixture) -> None:
    from nearkin_trainer.matching import operation
    from nearkin_trainer.matching.cpu.instructions import HAS_VNNI, PROCESSOR

    operation._log_once.cache_clear()
    case = random_case((5, 2, 2), (2, 2), (2, 2, 3))
    found = ", of maps of 48 to 64 locations found by int16" if HAS_VNNI else ""
    with caplog.at_level(logging.INFO, logger="nearkin"):
        location_maxima(case.probes, case.classes, case.candidates)
        location_maxima(case.probes.double(), case.classes.double(), case.candidates)
        location_maxima(case.probes, case.classes, case.candidates)
    assert [record.getMessage() for record in caplog.records] == [
        f"location_maxima: backend cpu (tensors are on cpu, products in float32{found} ({PROCESSOR}))",
        "location_maxima: backend plain ('cpu' computes in float32, not in float64)",
    ]


def test_errors_name_what_is_wrong() -> None:
    probes, classes, ids = (
        torch.ones(2, 3, 2, 2),
        torch.ones(4, 3, 2, 2),
        torch.zeros(2, 1, dtype=torch.int64),
    )
    wrong: list[tuple[dict[str, object], str]] = [
        ({"probes": probes[0]}, r"probes must be maps .* not \[3, 2, 2\]"),
        ({"classes": classes.int()}, "classes must be floating point, not torch.int32"),
        ({"classes": classes[:, :2]}, "probes have 3 channels and classes 2"),
        ({"candidates": ids[:1]}, r"candidates must be \[2, M\]"),
        ({"candidates": ids.float()}, "candidates must be int64"),
        ({"candidates": ids + 4}, r"candidates must lie in \[-1, 3\], found 4"),
        ({"candidates": ids - 2}, "found -2"),
        ({"probe_visibility": torch.ones(2, 4)}, r"probe_visibility must be \[2, 2, 2\]"),
        ({"backend": "fast"}, "backend must be 'auto' or one of plain, cpu, triton"),
        ({"probes": probes.double(), "backend": "cpu"}, "backend 'cpu' computes in float32"),
    ]
    for change, message in wrong:
        arguments = {"probes": probes, "classes": classes, "candidates": ids, **change}
        with pytest.raises(ValueError, match=message):
            location_maxima(**arguments)  # type: ignore[arg-type]
