"""The CPU backend: what `kernels` computes, as a differentiable PyTorch operation on all of torch's threads.

B probes, M candidates per probe, N classes, U touched classes, C channels,
P probe locations, Q class locations.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
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

from nearkin_trainer.matching.cpu.fixed import fix_probes
from nearkin_trainer.matching.cpu.fixed_instructions import MOST
from nearkin_trainer.matching.cpu.gradients import Given, Wanted, backward, finish
from nearkin_trainer.matching.cpu.instructions import BLOCK, FEW_ROWS, HAS_VNNI, LANES, PROCESSOR
from nearkin_trainer.matching.cpu.layout import Pairs, Probes, Table, prepare
from nearkin_trainer.matching.cpu.maxima import Found, forward
from nearkin_trainer.matching.cpu.memory import blocks
from nearkin_trainer.matching.request import Request
from nearkin_trainer.matching.rows import Touched, first_derivative, rows_gradient, take_rows

MOST_LOCATIONS = 1 << 15  # places are int16
MOST_THREADS = 32  # each sums its own probe gradients in the backward pass
PIECES = 8  # of forward for each thread
FIXED_CHANNELS = 128  # at least, for products in fixed point
CLASS_WORK = 2  # of backward for a class, where a pair of maps is 1
_FOUND = ", of maps of 48 to 64 locations found by int16" if HAS_VNNI else ""
DETAIL = f", products in float32{_FOUND} ({PROCESSOR})"


def location_maxima_cpu(request: Request) -> Tensor:
    """Maxima [B, M, P + Q] float32, of float32 products."""
    reason = unsupported(request)
    if reason:
        raise ValueError(f"backend 'cpu' {reason}; use backend 'plain'")
    classes, touched, sparse = request.classes, request.touched, request.sparse_gradient
    visibility = request.class_visibility
    if visibility is not None:
        visibility = _packed(take_rows(visibility, touched.ids, sparse=sparse).flatten(1))
    probe_visibility = request.probe_visibility
    if probe_visibility is not None:
        probe_visibility = _packed(probe_visibility)
    if classes.dtype != torch.float32 or not classes.is_contiguous():
        # The kernels read float32 rows in place; of any other table the touched rows are copied.
        classes = _packed(take_rows(classes, touched.ids, sparse=sparse))
        touched, sparse = Touched(torch.arange(len(touched.ids)), touched.slots), False
    probes = _packed(request.probes)
    maxima: Tensor = _Maxima.apply(  # type: ignore[no-untyped-call]
        probes, classes, probe_visibility, visibility, touched, sparse
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
    """How a step is shared among threads.

    pieces: ranges of touched classes, equal in the work of forward, which threads take as they are free.
    cuts: each thread's range in backward, whose sums depend on it; as equal in its work as can be foreseen.
    """

    pairs: Pairs
    pieces: tuple[tuple[int, int], ...]
    cuts: tuple[tuple[int, int], ...]
    shape: tuple[int, int]

    @staticmethod
    def of(touched: Touched, threads: int) -> Plan:
        slots = touched.slots.flatten().numpy()
        order = np.argsort(slots, kind="stable")
        starts = np.searchsorted(slots[order], np.arange(len(touched.ids) + 1))
        # By the probe of each class's first pair, which then stays in cache from class to class.
        visits = np.argsort(order[starts[:-1]], kind="stable")
        counts = np.diff(starts)[visits]
        probes, candidates = touched.slots.shape
        pairs = Pairs(touched.ids.numpy(), visits, starts, order, candidates)
        pieces = _equal(counts, threads * PIECES if threads > 1 else 1)
        return Plan(pairs, pieces, _equal(counts + CLASS_WORK, threads), (probes, candidates))

    def forward(self, work: Callable[[int, int], None]) -> None:
        """`work(first, last)` on every piece of the classes."""
        waiting = deque(self.pieces)

        def take(_thread: int, _first: int, _last: int) -> None:
            while True:
                try:
                    piece = waiting.popleft()
                except IndexError:
                    return
                work(*piece)

        _run(take, self.cuts)

    def backward(self, work: Callable[[int, int, int], None]) -> None:
        """`work(thread, first, last)` on every cut of the classes."""
        _run(work, self.cuts)

    def probes(self, work: Callable[[int, int, int], None]) -> None:
        """`work(thread, first, last)` on as many equal parts of the probes."""
        parts = max(len(self.cuts), 1)
        _run(work, _ranges([self.shape[0] * part // parts for part in range(parts + 1)]))


class _Maxima(Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        probes: Tensor,
        classes: Tensor,
        probe_visibility: Tensor | None,
        visibility: Tensor | None,
        touched: Touched,
        sparse: bool,
    ) -> Tensor:
        plan = Plan.of(touched, min(torch.get_num_threads(), MOST_THREADS))
        laid_out = _prepare(plan, _table(probes, probe_visibility), classes[0:1].flatten(2).shape[2])
        found = _forward(plan, _table(classes, visibility), laid_out)
        # These go through save_for_backward, which notices if someone changes them in between.
        ctx.save_for_backward(probes, classes, probe_visibility, visibility)
        ctx.plan, ctx.probes, ctx.found, ctx.sparse = plan, laid_out, found, sparse
        # Not a view of a tensor: who changes the result in place would be refused.
        return torch.from_numpy(found.maxima.reshape(*plan.shape, found.maxima.shape[1]))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, weights: Tensor) -> tuple[Tensor | None, ...]:
        probes, classes, probe_visibility, visibility = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        found: Found = ctx.found
        given = Given(
            _packed(weights.flatten(0, 1)).numpy(), found.where, found.dots, found.scales, found.lengths
        )
        step = _Step(ctx.plan, ctx.probes, given)
        sums, rows, row_visibility = _backward(step, _table(classes, visibility), rows=wanted[1] or wanted[3])
        maps, map_visibility = _finish(step, _table(probes, probe_visibility), sums)
        table = None
        if wanted[1]:
            ids, rows = torch.from_numpy(ctx.plan.pairs.ids), rows.view(-1, *classes.shape[1:])
            table = rows_gradient(ids, rows, classes.shape, sparse=ctx.sparse)
        gradients = (maps.view(probes.shape), table, map_visibility, row_visibility, None, None)
        return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


@dataclass(frozen=True)
class _Step:
    """What backward takes over from forward, and the gradients it is given."""

    plan: Plan
    probes: Probes
    given: Given


def _prepare(plan: Plan, maps: Table, class_locations: int) -> Probes:
    count, channels, locations = maps.maps.shape
    columns = -(-locations // LANES) * LANES
    rest = locations % LANES
    # A few locations cost less by themselves, along the class's locations, than in one more vector.
    if 0 < rest <= FEW_ROWS and min(locations, class_locations) >= LANES:
        columns = locations - rest
    fixed = _fixes(channels, locations, class_locations)
    width = MOST if fixed else -(-locations // LANES) * LANES
    laid_out = Probes(
        _lines(count, channels, width),
        columns,
        _lines(count if fixed else 0, -(-channels // 2), MOST).view(np.int32),
        _lines(count, -(-channels // BLOCK), locations, BLOCK),
        np.empty((count, locations), np.float32),
        np.empty((count, locations), np.float32),
        np.empty(count, np.float32),
    )

    def work(_thread: int, first: int, last: int) -> None:
        prepare(first, last, maps, laid_out)
        if fixed:
            fix_probes(first, last, maps, laid_out)

    plan.probes(work)
    return laid_out


def _fixes(channels: int, *locations: int) -> bool:
    """Whether products in fixed point are worth their pains, see `fixed`."""
    fit = all(3 * LANES <= count <= MOST and count % LANES <= FEW_ROWS for count in locations)
    return HAS_VNNI and fit and channels >= FIXED_CHANNELS


def _forward(plan: Plan, table: Table, probes: Probes) -> Found:
    pairs, locations = plan.shape[0] * plan.shape[1], table.maps.shape[2]
    shape = (pairs, probes.units.shape[2] + locations)
    found = Found(
        _lines(*shape),
        np.empty(shape, np.int16),
        _lines(*shape),
        np.empty((len(plan.pairs.ids), locations), np.float32),
        np.empty((len(plan.pairs.ids), locations), np.float32),
    )
    found.maxima[:] = 0  # which those of masked candidates stay
    plan.forward(lambda first, last: forward(first, last, table, plan.pairs, probes, found))
    return found


def _backward(step: _Step, table: Table, *, rows: bool) -> tuple[NDArray[np.float32], Tensor, Tensor]:
    """Gradients of the units, one sum per thread, and those of the touched rows and their visibilities."""
    plan = step.plan
    written = len(plan.pairs.ids) if rows else 0
    row_gradients = blocks.empty(written, *table.maps.shape[1:])
    visibility = torch.empty(written, table.maps.shape[2])
    threads = len(plan.cuts)
    sums = _lines(max(threads, 1), *step.probes.units.shape)
    if not threads:
        sums[:] = 0

    def work(thread: int, first: int, last: int) -> None:
        wanted = Wanted(sums[thread], row_gradients.numpy(), visibility.numpy())
        backward(first, last, table, plan.pairs, step.probes, step.given, wanted)

    plan.backward(work)
    return sums, row_gradients, visibility


def _finish(step: _Step, maps: Table, sums: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    gradients = _lines(*maps.maps.shape)
    visibility = np.empty((maps.maps.shape[0], maps.maps.shape[2]), np.float32)
    step.plan.probes(
        lambda _, first, last: finish(first, last, maps, step.probes, sums, gradients, visibility)
    )
    return torch.from_numpy(gradients), torch.from_numpy(visibility)


def _lines(*shape: int) -> NDArray[np.float32]:
    """An uninitialised array that starts with a cache line, as PyTorch's do and NumPy's do not."""
    array: NDArray[np.float32] = blocks.empty(*shape).numpy()
    return array


def _packed(values: Tensor) -> Tensor:
    """float32, with the strides of its shape, also where a dimension of 1 would let them be anything."""
    values = values.float()
    return values if values.is_contiguous() else values.clone(memory_format=torch.contiguous_format)


def _table(maps: Tensor, visibility: Tensor | None) -> Table:
    locations = maps.detach().flatten(2)
    if visibility is None:
        return Table(locations.numpy(), np.ones((1, locations.shape[2]), np.float32))
    return Table(locations.numpy(), visibility.detach().numpy())


def _equal(work: NDArray[np.int64], parts: int) -> tuple[tuple[int, int], ...]:
    """Ranges of classes with about as much work each."""
    total = np.concatenate([[0], np.cumsum(work)])
    return _ranges(np.searchsorted(total, np.linspace(0, total[-1], parts + 1)).tolist())


def _ranges(edges: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple((first, last) for first, last in itertools.pairwise(edges) if last > first)


def _run(work: Callable[[int, int, int], None], cuts: tuple[tuple[int, int], ...]) -> None:
    """Each cut on a thread of its own, the first on this one.

    PyTorch's own parallel loops are avoided before and between: its idle threads spin for a while on the
    cores that these threads need.
    """
    waiting = [_pool().submit(work, thread, *cut) for thread, cut in enumerate(cuts[1:], start=1)]
    if cuts:
        work(0, *cuts[0])
    for future in waiting:
        future.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=MOST_THREADS, thread_name_prefix="nearkin-matching")


# Threads do not survive a fork; a child that matches starts its own.
os.register_at_fork(after_in_child=_pool.cache_clear)
