"""One checked call of `location_maxima`, as every backend receives it.

B probes, M candidates per probe, N classes, C channels, P probe locations, Q class locations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nearkin_trainer.matching.rows import Touched, check_range, touched_classes

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Request:
    """Inputs with the probes' locations flattened, and the classes they touch.

    probes [B, C, P], probe_visibility [B, P]. The table keeps its shape, which its sparse gradient must have
    too: classes [N, C, Hc, Wc], class_visibility [N, Hc, Wc].
    """

    probes: Tensor
    classes: Tensor
    touched: Touched
    probe_visibility: Tensor | None
    class_visibility: Tensor | None
    sparse_gradient: bool

    @property
    def dtype(self) -> torch.dtype:
        """In which products are accumulated and maxima returned: float64 for float64 inputs, else float32."""
        wide = torch.promote_types(self.probes.dtype, self.classes.dtype)
        return torch.promote_types(wide, torch.float32)


def checked_request(
    probes: Tensor,
    classes: Tensor,
    candidates: Tensor,
    probe_visibility: Tensor | None,
    class_visibility: Tensor | None,
    *,
    sparse_gradient: bool,
) -> Request:
    """Check what the user gave; every `ValueError` names the argument and what it was."""
    _check_maps("probes", probes)
    _check_maps("classes", classes)
    if probes.shape[1] != classes.shape[1]:
        raise ValueError(
            f"probes have {probes.shape[1]} channels and classes {classes.shape[1]}: must be equal"
        )
    if probes.device != classes.device:
        raise ValueError(f"probes are on {probes.device} and classes on {classes.device}: move one of them")
    candidates = _checked_candidates(candidates, len(probes), classes)
    _check_visibility("probe_visibility", probe_visibility, probes)
    _check_visibility("class_visibility", class_visibility, classes)
    return Request(
        probes.flatten(2),
        classes,
        touched_classes(candidates),
        None if probe_visibility is None else probe_visibility.flatten(1),
        class_visibility,
        sparse_gradient,
    )


def _check_maps(name: str, maps: Tensor) -> None:
    if maps.dim() != 4 or 0 in maps.shape[1:]:
        raise ValueError(f"{name} must be maps [count, channels, height, width], not {list(maps.shape)}")
    if maps.dtype not in FLOATS:
        raise ValueError(f"{name} must be floating point, not {maps.dtype}")


def _checked_candidates(candidates: Tensor, probes: int, classes: Tensor) -> Tensor:
    if candidates.dim() != 2 or len(candidates) != probes:
        raise ValueError(f"candidates must be [{probes}, M], one row per probe, not {list(candidates.shape)}")
    if candidates.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"candidates must be int64 (or int32) class ids, not {candidates.dtype}")
    candidates = candidates.to(classes.device, torch.int64)
    check_range(candidates, len(classes))
    return candidates


def _check_visibility(name: str, visibility: Tensor | None, maps: Tensor) -> None:
    expected = [maps.shape[0], *maps.shape[2:]]
    if visibility is not None and list(visibility.shape) != expected:
        raise ValueError(f"{name} must be {expected}, one weight per location, not {list(visibility.shape)}")
