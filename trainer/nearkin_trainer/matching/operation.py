"""`location_maxima`: the one public function, and the choice of its backend."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from torch import Tensor

from nearkin_trainer.matching.plain import location_maxima_plain
from nearkin_trainer.matching.request import Request, checked_request

log = logging.getLogger("nearkin.trainer.matching")

BACKENDS: dict[str, Callable[[Request], Tensor]] = {"plain": location_maxima_plain}


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
        backend: "auto", "plain", or another of `BACKENDS`.
        probe_visibility: [B, Hp, Wp], optional; 1 = visible, 0 = occluded. A pair of locations is weighted
            by the product of its two visibilities before the maxima.
        class_visibility: [N, Hc, Wc], optional.
        sparse_gradient: whether gradients of `classes` and `class_visibility` are sparse tensors over
            dimension 0 that hold the touched rows only. False where `classes` is itself computed, such as a
            batch's features.

    Returns:
        [B, M, Hp·Wp + Hc·Wc]: cosines; for each probe location that of its best class location, then for each
        class location that of its best probe location. float64 for float64 inputs, else float32.
        A masked candidate's maxima are 0 and pass no gradient.

    Raises:
        ValueError: shapes, dtypes, devices or ids that do not fit, or an unknown backend.
    """
    request = checked_request(
        probes, classes, candidates, probe_visibility, class_visibility, sparse_gradient=sparse_gradient
    )
    return BACKENDS[choose_backend(backend)](request)


def choose_backend(name: str) -> str:
    """The backend that `name` stands for; "auto" is logged with its reason, once."""
    if name == "auto":
        return _automatic()
    if name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(BACKENDS)}, not {name!r}")
    return name


@functools.cache
def _automatic() -> str:
    log.info("location_maxima: backend plain (the only one built in so far)")
    return "plain"
