"""The Triton backend: what the kernels compute, as a differentiable PyTorch operation.

B probes, M candidates per probe, N classes, U touched classes, C channels,
P probe locations, Q class locations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from nearkin_trainer.matching.plain import EPSILON
from nearkin_trainer.matching.request import Request
from nearkin_trainer.matching.rows import Touched, first_derivative, rows_gradient, take_rows
from nearkin_trainer.matching.triton import kernels

MOST_LOCATIONS = 1024
TILE = 64  # locations; a 64 × 64 accumulator stays in registers
DETAIL = ""
INTERPRETED = bool(triton.knobs.runtime.interpret)
TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def location_maxima_triton(request: Request) -> Tensor:
    """Maxima [B, M, P + Q] float32; products in the maps' own dtype, accumulated in float32."""
    reason = unsupported(request)
    if reason:
        raise ValueError(f"backend 'triton' {reason}; use backend 'plain'")
    visibility = request.class_visibility
    if visibility is not None:
        visibility = take_rows(visibility, request.touched.ids, sparse=request.sparse_gradient)
        visibility = visibility.flatten(1).float().contiguous()
    probe_visibility = request.probe_visibility
    if probe_visibility is not None:
        probe_visibility = probe_visibility.float().contiguous()
    classes, touched, sparse = request.classes, request.touched, request.sparse_gradient
    if not classes.is_contiguous():
        # The kernels read rows in place; of a table laid out otherwise the touched rows are copied.
        classes = take_rows(classes, touched.ids, sparse=sparse).contiguous()
        touched = Touched(torch.arange(len(touched.ids), device=classes.device), touched.slots)
        sparse = False
    maxima: Tensor = _Maxima.apply(  # type: ignore[no-untyped-call]
        request.probes.contiguous(), classes, probe_visibility, visibility, touched, sparse
    )
    return maxima


def unsupported(request: Request) -> str:
    """Why this backend cannot serve a request; empty when it can."""
    if request.probes.device.type != "cuda" and not INTERPRETED:
        return f"needs tensors on a CUDA device, not on {request.probes.device}"
    if request.dtype != torch.float32:
        return "computes in float32, not in float64"
    if max(request.probes.shape[2], request.classes.shape[2] * request.classes.shape[3]) > MOST_LOCATIONS:
        return f"takes maps of at most {MOST_LOCATIONS} locations"
    return ""


@dataclass(frozen=True)
class Side:
    """Probes or classes: their maps, and the pairs each takes part in.

    maps [·, C, L]; rows int64 [items] into maps; scales and lengths float32 [items, L].
    starts int64 [items + 1] into pairs; map_of_pair and item_of_pair int64 [B · M].
    """

    maps: Tensor
    rows: Tensor
    scales: Tensor
    lengths: Tensor
    starts: Tensor
    pairs: Tensor
    map_of_pair: Tensor
    item_of_pair: Tensor


class _Maxima(Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        probes_BCP: Tensor,
        classes: Tensor,
        probe_visibility_BP: Tensor | None,
        class_visibility_UQ: Tensor | None,
        touched: Touched,
        sparse: bool,
    ) -> Tensor:
        slots = touched.slots.flatten()
        probe_of_pair = torch.arange(len(slots), device=slots.device) // max(touched.slots.shape[1], 1)
        everyone = torch.arange(len(probes_BCP), device=slots.device)
        probe_items = torch.where(slots >= 0, probe_of_pair, -1)
        probe_side = _side(probes_BCP, everyone, probe_items, probe_visibility_BP)
        class_side = _side(classes.flatten(2), touched.ids, slots, class_visibility_UQ)
        found, where = _forward(probe_side, class_side, touched.slots.shape)
        # The maps go through save_for_backward, which notices if someone changes them in between.
        ctx.save_for_backward(probes_BCP, classes, probe_visibility_BP, class_visibility_UQ)
        ctx.sides, ctx.outcome, ctx.sparse = (probe_side, class_side), (found, where), sparse
        return found.clone()  # backward needs the maxima as they are; who has the result may change it

    @staticmethod
    @first_derivative
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        _, classes, *_ = ctx.saved_tensors
        probe_side, class_side = ctx.sides
        wanted = ctx.needs_input_grad
        result: list[Tensor | None] = [None] * 6
        if wanted[0] or wanted[2]:
            result[0], result[2] = _side_gradient(probe_side, class_side, weights, ctx.outcome, first=True)
        if wanted[1] or wanted[3]:
            rows, result[3] = _side_gradient(class_side, probe_side, weights, ctx.outcome, first=False)
            rows = rows.view(-1, *classes.shape[1:])
            result[1] = rows_gradient(class_side.rows, rows, classes.shape, sparse=ctx.sparse)
        return tuple(gradient if want else None for gradient, want in zip(result, wanted, strict=True))


def _side(maps: Tensor, rows: Tensor, item_of_pair: Tensor, visibility: Tensor | None) -> Side:
    locations = maps.shape[2]
    lengths = torch.empty(len(rows), locations, device=maps.device)
    if lengths.numel():
        tile = _tile(locations)
        grid = (len(rows), triton.cdiv(locations, tile))
        kernels.lengths[grid](maps, rows, lengths, maps.shape[1], locations, BQ=tile, BC=32)
    scales = 1.0 / lengths.clamp_min(EPSILON)
    if visibility is not None:
        scales = visibility.detach() * scales
    order = torch.argsort(item_of_pair, stable=True)
    items = torch.arange(len(rows) + 1, device=maps.device)
    starts = torch.searchsorted(item_of_pair[order], items)
    map_of_pair = rows[item_of_pair.clamp_min(0)] if len(rows) else item_of_pair
    return Side(maps.detach(), rows, scales, lengths, starts, order, map_of_pair, item_of_pair.clamp_min(0))


def _forward(probe_side: Side, class_side: Side, shape: torch.Size) -> tuple[Tensor, Tensor]:
    channels, P, Q = probe_side.maps.shape[1], probe_side.maps.shape[2], class_side.maps.shape[2]
    device = probe_side.maps.device
    small = torch.uint8 if max(P, Q) <= 256 else torch.int16
    found = torch.zeros(*shape, P + Q, device=device)
    where = torch.zeros(*shape, P + Q, dtype=small, device=device)
    # Masked pairs sort first; what is left is grouped by class.
    pairs = class_side.pairs[int(class_side.starts[0]) :] if len(class_side.pairs) else class_side.pairs
    if len(pairs):
        dtype = torch.promote_types(probe_side.maps.dtype, class_side.maps.dtype)
        kernels.maxima[(len(pairs),)](
            probe_side.maps,
            class_side.maps,
            pairs,
            class_side.map_of_pair,
            class_side.item_of_pair,
            probe_side.scales,
            class_side.scales,
            found,
            where,
            shape[1],
            channels,
            P,
            Q,
            BP=_tile(P),
            BQ=_tile(Q),
            BC=32 if dtype == torch.float32 else 64,
            TILES_P=triton.cdiv(P, _tile(P)),
            TILES_Q=triton.next_power_of_2(triton.cdiv(Q, _tile(Q))),
            PRECISION=_precision(),
            # The interpreter multiplies bfloat16 wrongly, and silently.
            DTYPE=tl.float32 if INTERPRETED else TRITON_DTYPES[dtype],
        )
    return found, where


def _side_gradient(
    own: Side, other: Side, weights: Tensor, outcome: tuple[Tensor, Tensor], *, first: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the maps [items, C, O] and visibilities [items, O] of a side; is it the `first` half?"""
    found, where = outcome
    channels, O, T = own.maps.shape[1], own.maps.shape[2], other.maps.shape[2]  # noqa: E741
    block = 32
    parts = triton.cdiv(channels, block)
    gradient = torch.empty(len(own.rows), channels, O, dtype=own.maps.dtype, device=own.maps.device)
    visibility = torch.empty(len(own.rows), parts, O, device=own.maps.device)
    if len(own.rows):
        kernels.side_gradient[(len(own.rows), triton.cdiv(O, _tile(O)), parts)](
            own.maps,
            own.rows,
            own.scales,
            own.lengths,
            other.maps,
            other.map_of_pair,
            other.item_of_pair,
            other.scales,
            own.starts,
            own.pairs,
            weights.contiguous(),
            found,
            where,
            gradient,
            visibility,
            channels,
            O,
            T,
            0 if first else T,
            O if first else 0,
            FLOOR=EPSILON,
            BO=_tile(O),
            BT=_tile(T),
            BC=block,
            PRECISION=_precision(),
            VISIBILITY=True,
        )
    return gradient, visibility.sum(dim=1)


def _tile(locations: int) -> int:
    """Of the locations; at least the 16 that a tensor core multiplies."""
    return int(min(max(triton.next_power_of_2(locations), 16), TILE))


def _precision() -> str:
    """How float32 is multiplied: as three TF32 products, which is float32 to about one bit."""
    return "tf32x3" if torch.version.cuda and not INTERPRETED else "ieee"
