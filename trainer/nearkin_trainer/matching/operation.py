"""`location_maxima`: the one public function, and the choice of its backend."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from nearkin_trainer.matching.plain import location_maxima_plain
from nearkin_trainer.matching.request import Request, checked_request

log = logging.getLogger("nearkin.trainer.matching")

BACKENDS = ("plain", "cpu", "triton")


def location_maxima(
    probes: Tensor,
    classes: Tensor,
    candidates: Tensor,
    backend: str = "auto",
    *,
    probe_visibility: Tensor | None = None,
    class_visibility: Tensor | None = None,
    sparse_gradient: bool = True,
) -> Tensor:
    """How well each location of a map finds its like in the other map.

    Args:
        probes: [B, C, Hp, Wp], float; each location is L2-normalised inside.
        classes: [N, C, Hc, Wc], float; the class table, of which only candidates are read and normalised.
        candidates: [B, M] int64 class ids, −1 = none.
        backend: "auto", or one of "plain", "cpu" and "triton". All give the same maxima up to rounding.
        probe_visibility: [B, Hp, Wp], optional; 1 = visible, 0 = occluded. A pair of locations is weighted
            by the product of its two visibilities before the maxima.
        class_visibility: [N, Hc, Wc], optional.
        sparse_gradient: whether gradients of `classes` and `class_visibility` are sparse tensors over
            dimension 0 that hold the touched rows only. False where `classes` is itself computed, such as a
            batch's features.

    Returns:
        [B, M, Hp·Wp + Hc·Wc]: cosines; for each probe location that of its best class location, then for each
        class location that of its best probe location. float64 for float64 inputs, else float32, whatever
        autocast says.
        A masked candidate's maxima are 0 and pass no gradient.

    Raises:
        ValueError: shapes, dtypes, devices or ids that do not fit, or an unknown backend.
    """
    request = checked_request(
        probes, classes, candidates, probe_visibility, class_visibility, sparse_gradient=sparse_gradient
    )
    with torch.autocast(probes.device.type, enabled=False):
        return _load(choose_backend(backend, request))(request)


def choose_backend(name: str, request: Request) -> str:
    """The backend that `name` stands for; each choice of "auto" is logged once with its reason."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, not {name!r}")
    if name != "auto":
        return name
    chosen, reason = _automatic(request)
    _log_once(chosen, reason)
    return chosen


def _automatic(request: Request) -> tuple[str, str]:
    name, detail = "cpu" if request.probes.device.type == "cpu" else "triton", ""
    try:
        module = _module(name)
        reason, detail = module.unsupported(request), module.DETAIL
    except ImportError as missing:
        reason = f"cannot be imported: {missing}"
    if reason:
        return "plain", f"'{name}' {reason}"
    return name, f"tensors are on {request.probes.device}{detail}"


def _load(name: str) -> Callable[[Request], Tensor]:
    if name == "plain":
        return location_maxima_plain
    function: Callable[[Request], Tensor] = getattr(_module(name), f"location_maxima_{name}")
    return function


def _module(name: str) -> ModuleType:
    """A backend's module, imported when it is first asked for: Numba and Triton take their time."""
    return importlib.import_module(f"nearkin_trainer.matching.{name}.backend")


@functools.cache
def _log_once(chosen: str, reason: str) -> None:
    log.info("location_maxima: backend %s (%s)", chosen, reason)
