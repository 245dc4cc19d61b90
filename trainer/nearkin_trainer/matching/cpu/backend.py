"""The CPU backend: what `kernels` computes, as a differentiable PyTorch operation on all of torch's threads.

B probes, M candidates per probe, N classes, U touched classes, C channels,
P probe locations, Q class locations.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nearkin_trainer.matching.cpu import kernels
from nearkin_trainer.matching.cpu.instructions import HAS_BF16
from nearkin_trainer.matching.cpu.memory import empty_on_huge_pages
from nearkin_trainer.matching.plain import units
from nearkin_trainer.matching.request import Request
from nearkin_trainer.matching.rows import Touched, rows_gradient, take_rows

MOST_LOCATIONS = 1 << 15  # places are int16
MOST_THREADS = 32  # each sums its own probe gradients in the backward pass
PADDING = 32  # channels of a unit, so that every row of locations is whole vectors


def location_maxima_cpu(request: Request) -> Tensor:
    """Maxima [B, M, P + Q] float32, of float32 products whatever the processor multiplies in."""
    reason = unsupported(request)
    if reason:
        raise ValueError(f"backend 'cpu' {reason}; use backend 'plain'")
    classes, ids, sparse = request.classes, request.touched.ids, request.sparse_gradient
    probe_units_BCP = units(request.probes.float(), request.probe_visibility)
    probe_units_BPC = F.pad(probe_units_BCP.transpose(1, 2), (0, -request.probes.shape[1] % PADDING))
    visibility = request.class_visibility
    if visibility is not None:
        visibility = take_rows(visibility, ids, sparse=sparse).flatten(1).float()
    if classes.dtype != torch.float32 or not classes.is_contiguous():
        # The kernels read float32 rows in place; of any other table the touched rows are copied.
        classes = take_rows(classes, ids, sparse=sparse).float().contiguous()
        ids, sparse = torch.arange(len(ids)), False
    touched = Touched(ids, request.touched.slots)
    maxima: Tensor = _Maxima.apply(  # type: ignore[no-untyped-call]
        probe_units_BPC, classes, visibility, touched, sparse
    )
    return maxima


def unsupported(request: Request) -> str:
    """Why this backend cannot serve a request; empty when it can."""
    if request.probes.device.type != "cpu":
        return f"needs tensors on the cpu, not on {request.probes.device}"
    if request.dtype != torch.float32:
        return "computes in float32, not in float64"
    if max(request.probes.shape[2], request.classes[0:1].flatten(2).shape[2]) > MOST_LOCATIONS:
        return f"takes maps of at most {MOST_LOCATIONS} locations"
    return ""


@dataclass(frozen=True)
class Plan:
    """The pairs (probe · M + candidate) of a step, grouped by the class they want.

    starts: int64 [U + 1] into pairs. cuts: the range of classes of each thread, equal in pairs.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    pairs: NDArray[np.int64]
    cuts: tuple[tuple[int, int], ...]
    shape: tuple[int, int]

    @staticmethod
    def of(touched: Touched, threads: int) -> Plan:
        slots = touched.slots.flatten().numpy()
        order = np.argsort(slots, kind="stable")
        starts = np.searchsorted(slots[order], np.arange(len(touched.ids) + 1))
        # A class costs about as much to read and lay out as two pairs cost to multiply.
        work = np.arange(len(starts)) * 2 + starts - starts[0]
        edges = np.searchsorted(work, np.linspace(0, work[-1], threads + 1)).tolist()
        cuts = tuple((a, b) for a, b in itertools.pairwise(edges) if b > a)
        probes, candidates = touched.slots.shape
        return Plan(touched.ids.numpy(), starts, order, cuts, (probes, candidates))

    def run(self, work: Callable[[int, int, int], None]) -> None:
        """`work(thread, first, last)` on every cut, each on a thread of its own."""
        waiting = [_pool().submit(work, thread, *cut) for thread, cut in enumerate(self.cuts[1:], start=1)]
        if self.cuts:
            work(0, *self.cuts[0])
        for future in waiting:
            future.result()


class _Maxima(Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        units_BPC: Tensor,
        classes: Tensor,
        visibility_UQ: Tensor | None,
        touched: Touched,
        sparse: bool,
    ) -> Tensor:
        plan = Plan.of(touched, min(torch.get_num_threads(), MOST_THREADS))
        maxima, where = _forward(plan, units_BPC, classes, visibility_UQ)
        ctx.plan, ctx.where, ctx.sparse, ctx.ids = plan, where, sparse, touched.ids
        ctx.save_for_backward(units_BPC, classes, visibility_UQ)
        return maxima.view(*plan.shape, maxima.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        _, classes, visibility_UQ = ctx.saved_tensors
        wanted = any(ctx.needs_input_grad[1:3])
        found = _backward(ctx.plan, ctx.saved_tensors, ctx.where, weights, rows=wanted)
        table = None
        if ctx.needs_input_grad[1]:
            rows = found.rows.view(-1, *classes.shape[1:])
            table = rows_gradient(ctx.ids, rows, classes.shape, sparse=ctx.sparse)
        return found.units, table, found.visibility if visibility_UQ is not None else None, None, None


@dataclass(frozen=True)
class _Gradients:
    units: Tensor
    rows: Tensor
    visibility: Tensor


def _forward(
    plan: Plan, units_BPC: Tensor, classes: Tensor, visibility_UQ: Tensor | None
) -> tuple[Tensor, NDArray[np.int16]]:
    table = classes.detach().flatten(2)
    probe_units = _packed(units_BPC, torch.float32)
    pairs, places = plan.shape[0] * plan.shape[1], probe_units.shape[1] + table.shape[2]
    maxima, where = torch.zeros(pairs, places), np.zeros((pairs, places), np.int16)
    tiles = _packed(units_BPC, torch.bfloat16 if HAS_BF16 else torch.float32).view(torch.int32)
    tops = torch.linalg.vector_norm(probe_units, dim=2).max(dim=1).values.numpy()

    def work(_thread: int, first: int, last: int) -> None:
        kernels.forward(
            first,
            last,
            plan.ids,
            plan.starts,
            plan.pairs,
            plan.shape[1],
            table.numpy(),
            _visibility(visibility_UQ, table.shape[2]),
            probe_units.numpy(),
            tiles.numpy().view(np.uint32),
            tops,
            maxima.numpy(),
            where,
        )

    plan.run(work)
    return maxima, where


def _backward(
    plan: Plan,
    inputs: tuple[Tensor, Tensor, Tensor | None],
    where: NDArray[np.int16],
    weights: Tensor,
    *,
    rows: bool,
) -> _Gradients:
    units_BPC, classes, visibility_UQ = inputs
    table = classes.detach().flatten(2)
    written = len(plan.ids) if rows else 0
    row_gradients = empty_on_huge_pages(written, *table.shape[1:])
    visibility = torch.empty(written, table.shape[2])
    flat = weights.flatten(0, 1).contiguous().numpy()
    probe_units = _packed(units_BPC, torch.float32)
    # One sum per thread, added up in order: the same threads give the same bits.
    sums = torch.zeros(len(plan.cuts), *units_BPC.shape)

    def work(thread: int, first: int, last: int) -> None:
        kernels.backward(
            first,
            last,
            plan.ids,
            plan.starts,
            plan.pairs,
            plan.shape[1],
            table.numpy(),
            _visibility(visibility_UQ, table.shape[2]),
            probe_units.numpy(),
            where,
            flat,
            sums[thread].numpy(),
            row_gradients.numpy(),
            visibility.numpy(),
        )

    plan.run(work)
    return _Gradients(sums.sum(dim=0), row_gradients, visibility)


def _packed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy whose strides are those of its shape, also where a dimension of 1 would let them be anything."""
    return torch.empty(values.shape, dtype=dtype).copy_(values.detach())


def _visibility(visibility_UQ: Tensor | None, locations: int) -> NDArray[np.float32]:
    if visibility_UQ is None:
        return np.ones((1, locations), np.float32)
    return visibility_UQ.detach().contiguous().numpy()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=MOST_THREADS, thread_name_prefix="nearkin-matching")


# Threads do not survive a fork; a child that matches starts its own.
os.register_at_fork(after_in_child=_pool.cache_clear)
