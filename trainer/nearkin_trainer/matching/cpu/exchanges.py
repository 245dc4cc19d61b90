# ruff: noqa: PLR0917 (compiled functions take no keywords)
# mypy: disable-error-code="untyped-decorator,no-untyped-call"
"""The vector instructions of the backward pass, as `instructions` has those of the forward pass.

exchange          the gradients of sims, to both their locations, while memory is fetched and written
take_16, give_16  a 16 × 16 block of float32, transposed, on its way into and out of those gradients
stream            write a line that nobody will read soon
fetch             bring a line near that will be read soon
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types

from nearkin_trainer.matching.cpu.instructions import (
    BLOCK,
    F32,
    HAS_AVX512,
    I32,
    I64,
    LANES,
    LINE,
    F32x16,
    intrinsic,
    load,
    multiply_add,
    new_function,
    pointer,
    prefetch,
    splat,
    store,
)

# Rows of a square that is transposed in registers, which have to hold all of it.
_SIDE = F32x16 if HAS_AVX512 else ir.VectorType(F32, LANES // 2)
_SQUARES = tuple(itertools.product(range(0, LANES, _SIDE.count), repeat=2))


@intrinsic
def exchange(
    typing: Any,
    links: Any,
    places: Any,
    weights: Any,
    a: Any,
    b: Any,
    a_gradient: Any,
    b_gradient: Any,
    ahead: Any,
    pace: Any,
    source: Any,
    target: Any,
    lines: Any,
) -> Any:
    """b_gradient[q] += weight · a[p] and a_gradient[p] += weight · b[q], for each of `links` ≥ 1.

    places: int32 pairs, p and q times the bytes of a location, which are those of BLOCK float32. From `ahead`
    on, memory is fetched that will be read soon, `pace` bytes with each link. With each of the first,
    one of `lines` cache lines is copied past the caches, from `source` to `target`, a multiple of its size.
    """

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.call(_exchange_function(builder.module), arguments)
        return ir.Constant(I64, 0)

    return types.int64(*[types.int64] * 12), codegen


def _exchange_function(module: Any) -> Any:
    name = "nearkin_exchange"
    if name in module.globals:
        return module.globals[name]
    function = new_function(module, name, 12)
    links, places, weights, a, b, a_gradient, b_gradient, ahead, pace, source, target, lines = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    with cgutils.for_range(builder, links) as loop:

        def at(start: Any, step: Any) -> Any:
            return builder.add(start, builder.mul(loop.index, step))

        place = load(builder, at(places, ir.Constant(I64, 8)), 0, I64)
        p, q = builder.and_(place, ir.Constant(I64, 2**32 - 1)), builder.lshr(place, ir.Constant(I64, 32))
        weight = splat(builder, load(builder, at(weights, ir.Constant(I64, 4)), 0, F32), F32x16)
        sides = ((a, p, b_gradient, q), (b, q, a_gradient, p))
        for offset in range(0, 4 * BLOCK, 4 * LANES):
            for start, one, gradient, other in sides:
                value = load(builder, builder.add(start, one), offset, F32x16)
                to = builder.add(gradient, other)
                total = load(builder, to, offset, F32x16)
                store(builder, multiply_add(builder, weight, value, total), to, offset)
        prefetch(builder, at(ahead, pace))
        with builder.if_then(builder.icmp_signed("<", loop.index, lines), likely=True):
            _stream(builder, at(source, ir.Constant(I64, LINE)), at(target, ir.Constant(I64, LINE)))
    builder.ret_void()
    return function


@intrinsic
def stream(typing: Any, source: Any, target: Any) -> Any:
    """Copy a cache line past the caches, to a target that is a multiple of its size."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        _stream(builder, *values)
        return ir.Constant(I64, 0)

    return types.int64(types.int64, types.int64), codegen


def _stream(builder: Any, source: Any, target: Any) -> None:
    written = builder.store(load(builder, source, 0, F32x16), pointer(builder, target), align=LINE)
    written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))


@intrinsic
def fetch(typing: Any, address: Any) -> Any:
    """Bring the cache line at an address near."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        prefetch(builder, values[0])
        return ir.Constant(I64, 0)

    return types.int64(types.int64), codegen


@intrinsic
def take_16(
    typing: Any, source: Any, source_stride: Any, scales: Any, target: Any, target_stride: Any
) -> Any:
    """target[j, i] = scales[j] · source[i, j] of a 16 × 16 float32 block; strides in bytes."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        source, source_stride, scales, target, target_stride = values
        for i, j in _SQUARES:
            factors = load(builder, scales, 4 * j, _SIDE)
            rows = [
                builder.fmul(load(builder, start, 4 * j, _SIDE), factors)
                for start in _starts(builder, source, source_stride, i)
            ]
            starts = _starts(builder, target, target_stride, j)
            for row, start in zip(_transposed(builder, rows), starts, strict=True):
                store(builder, row, start, 4 * i)
        return ir.Constant(I64, 0)

    return types.int64(*[types.int64] * 5), codegen


@intrinsic
def give_16(
    typing: Any,
    gradients: Any,
    gradient_stride: Any,
    scales: Any,
    factors: Any,
    row: Any,
    row_stride: Any,
    target: Any,
    target_stride: Any,
) -> Any:
    """target[j, i] = scales[i] · gradients[i, j] − factors[i] · row[j, i] of a 16 × 16 block."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        gradients, gradient_stride, scales, factors, row, row_stride, target, target_stride = values
        for i, j in _SQUARES:
            scale = load(builder, scales, 4 * i, _SIDE)
            factor = builder.fneg(load(builder, factors, 4 * i, _SIDE))
            starts = _starts(builder, gradients, gradient_stride, i)
            rows = [load(builder, start, 4 * j, _SIDE) for start in starts]
            sources = _starts(builder, row, row_stride, j)
            targets = _starts(builder, target, target_stride, j)
            for line, source, end in zip(_transposed(builder, rows), sources, targets, strict=True):
                along = builder.fmul(factor, load(builder, source, 4 * i, _SIDE))
                store(builder, multiply_add(builder, scale, line, along), end, 4 * i)
        return ir.Constant(I64, 0)

    return types.int64(*[types.int64] * 8), codegen


def _starts(builder: Any, address: Any, stride: Any, first: int) -> list[Any]:
    """Where the rows of a square begin."""
    rows = range(first, first + _SIDE.count)
    return [builder.add(address, builder.mul(stride, ir.Constant(I64, row))) for row in rows]


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    distance = len(rows) // 2
    while distance:
        rows = _swapped(builder, rows, distance)
        distance //= 2
    return rows


def _swapped(builder: Any, rows: list[Any], distance: int) -> list[Any]:
    """Swap the off-diagonal blocks of every 2·distance square: one step of a transpose."""
    side = len(rows)
    upper = [lane if not lane & distance else lane - distance + side for lane in range(side)]
    lower = [lane + distance if not lane & distance else lane + side for lane in range(side)]
    result = list(rows)
    for row in range(side):
        if not row & distance:
            pair = rows[row], rows[row + distance]
            for target, lanes in ((row, upper), (row + distance, lower)):
                mask = ir.Constant(ir.VectorType(I32, side), lanes)
                result[target] = builder.shuffle_vector(*pair, mask)
    return result
