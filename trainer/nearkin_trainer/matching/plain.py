"""The operation in plain PyTorch: the definition, the oracle of the other backends, and a backend itself.

    units(x)         = visibility · x / max(|x|, 1e-12), for each location of each map
    sims[b, m, p, q] = <units(probes)[b, :, p], units(classes)[candidates[b, m], :, q]>
    maxima[b, m]     = concat(max over q of sims[b, m], max over p of sims[b, m])

B probes, M candidates per probe, N classes, U touched classes, C channels,
P probe locations, Q class locations.
Sources: S. Liao and L. Shao, ECCV 2020, equations 1 to 3; the order of the two halves is that of their code
since version 1.3.1. Of equal maxima the first location gets the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nearkin_trainer.matching.request import Request
from nearkin_trainer.matching.rows import take_rows

EPSILON = 1e-12  # the floor of a location's length, as in torch.nn.functional.normalize


def location_maxima_plain(request: Request) -> Tensor:
    """Maxima [B, M, P + Q] in the accumulation dtype; a masked candidate's are 0."""
    touched, sparse = request.touched, request.sparse_gradient
    rows_UCQ = take_rows(request.classes, touched.ids, sparse=sparse)
    visible_UQ = request.class_visibility
    if visible_UQ is not None:
        visible_UQ = take_rows(visible_UQ, touched.ids, sparse=sparse).flatten(1)
    class_units_UCQ = units(rows_UCQ.flatten(2).to(request.dtype), visible_UQ)
    probe_units_BCP = units(request.probes.to(request.dtype), request.probe_visibility)
    maxima = [
        _one_probe(probe_CP, class_units_UCQ, slots_M)
        for probe_CP, slots_M in zip(probe_units_BCP, touched.slots, strict=True)
    ]
    if maxima:
        return torch.stack(maxima)
    places = probe_units_BCP.shape[2] + class_units_UCQ.shape[2]
    # No probe, and still a result that can be differentiated.
    return (probe_units_BCP.sum() + class_units_UCQ.sum()).expand(*touched.slots.shape, places)


def units(maps_XCL: Tensor, visibility_XL: Tensor | None) -> Tensor:
    """Each location divided by its length, times its visibility."""
    lengths_X1L: Tensor = torch.linalg.vector_norm(maps_XCL, dim=1, keepdim=True).clamp_min(EPSILON)
    units_XCL = maps_XCL / lengths_X1L
    if visibility_XL is not None:
        units_XCL = units_XCL * visibility_XL.to(units_XCL.dtype)[:, None]
    return units_XCL


def _one_probe(probe_CP: Tensor, class_units_UCQ: Tensor, slots_M: Tensor) -> Tensor:
    present = torch.nonzero(slots_M >= 0).squeeze(1)
    sims_mPQ = torch.einsum("cp,mcq->mpq", probe_CP, class_units_UCQ[slots_M[present]])
    maxima_mL = torch.cat([sims_mPQ.max(dim=2).values, sims_mPQ.max(dim=1).values], dim=1)
    return maxima_mL.new_zeros(len(slots_M), maxima_mL.shape[1]).index_copy(0, present, maxima_mL)
