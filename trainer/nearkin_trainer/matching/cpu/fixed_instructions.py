# ruff: noqa: PLR0917 (compiled functions take no keywords)
# mypy: disable-error-code="untyped-decorator,no-untyped-call"
"""The vector instructions of products in fixed point, see `fixed`.

fix_pairs          float32 rows as pairs of int16
raise_tops         the highest of each row and column of int32
reach, reach_each  which of 64 int32 reach a limit, or that of their own column
first_bit          the lowest bit that is set
chosen_sums        products in float32, of locations with chosen ones of the other map and of chosen pairs
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types

from nearkin_trainer.matching.cpu.instructions import (
    HAS_VNNI,
    I1,
    I16,
    I32,
    I64,
    LANES,
    F32x16,
    I32x16,
    call_one,
    declared,
    intrinsic,
    load,
    multiply_add,
    new_function,
    pointer,
    splat,
    store,
)

MOST = 4 * LANES  # locations of a map
_PARTS = range(0, MOST, LANES)
_VECTORS = (3, 4) if HAS_VNNI else ()  # whole vectors of a map; elsewhere these are never called
_ROUNDS = 1.5 * 2**23  # float32 of this size are integers, with those near it in their lowest bits


@intrinsic
def fix_pairs(
    typing: Any, vectors: Any, tail: Any, row: Any, stride: Any, channels: Any, scales: Any, out: Any
) -> Any:
    """out[c, q] = row[2c, q] · scales[q] and row[2c + 1, q] · scales[q], rounded to int16, side by side.

    Of 3 or 4 vectors of locations and, if any bit of `tail` is set, of those lanes of one more. out:
    [C / 2, 64]. Of an odd number of channels, the last goes with 0.
    """

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        vectors, *rest = values
        functions = {v: _fix_function(builder.module, v) for v in _VECTORS}
        return call_one(builder, vectors, functions, rest)

    return types.int64(*[types.int64] * 7), codegen


def _fix_function(module: Any, vectors: int) -> Any:
    name = f"nearkin_fix_{vectors}"
    if name in module.globals:
        return module.globals[name]
    function = new_function(module, name, 6)
    tail, row, stride, channels, scales, out = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    mask = builder.bitcast(builder.trunc(tail, I16), ir.VectorType(I1, LANES))
    rounds = ir.Constant(F32x16, [_ROUNDS] * LANES)
    low, high = ir.Constant(I32x16, [0xFFFF] * LANES), ir.Constant(I32x16, [16] * LANES)
    one = ir.Constant(I64, 1)
    count = min(vectors + 1, MOST // LANES)

    def locations(address: Any) -> list[Any]:
        whole = [load(builder, address, 4 * LANES * v, F32x16) for v in range(vectors)]
        return [*whole, *(load_lanes(builder, address, 4 * LANES * v, mask) for v in range(vectors, count))]

    def rounded(address: Any) -> list[Any]:
        return [
            builder.bitcast(multiply_add(builder, value, factor, rounds), I32x16)
            for value, factor in zip(locations(address), factors, strict=True)
        ]

    def at(start: Any, step: Any, size: Any) -> Any:
        return builder.add(start, builder.mul(step, size))

    def put(packed: list[Any], pair: Any) -> None:
        address = at(out, pair, ir.Constant(I64, 4 * MOST))
        for v, values in enumerate(packed):
            store(builder, values, address, 4 * LANES * v)

    factors = locations(scales)
    half = builder.lshr(channels, one)
    with cgutils.for_range(builder, half) as loop:
        even = at(row, builder.shl(loop.index, one), stride)
        pairs = zip(rounded(even), rounded(builder.add(even, stride)), strict=True)
        put([builder.or_(builder.and_(a, low), builder.shl(b, high)) for a, b in pairs], loop.index)
    with builder.if_then(builder.trunc(channels, I1)):
        alone = rounded(at(row, builder.sub(channels, one), stride))
        put([builder.and_(a, low) for a in alone], half)
    builder.ret_void()
    return function


def load_lanes(builder: Any, address: Any, offset_bytes: int, mask: Any) -> Any:
    """Those lanes that the mask names, and 0; no others are read."""
    function = declared(
        builder, "llvm.masked.load.v16f32.p0", F32x16, [ir.PointerType(), I32, mask.type, F32x16]
    )
    arguments = pointer(builder, address, offset_bytes), ir.Constant(I32, 4), mask, ir.Constant(F32x16, None)
    return builder.call(function, arguments)


@intrinsic
def reach(typing: Any, values: Any, limit: Any) -> Any:
    """Bit i of the result: the i-th of 64 int32 is `limit` or more."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _reached(builder, arguments[0], [splat(builder, arguments[1], I32x16)] * len(_PARTS))

    return types.int64(types.int64, types.int32), codegen


@intrinsic
def reach_each(typing: Any, values: Any, limits: Any) -> Any:
    """Bit i of the result: the i-th of 64 int32 is the i-th limit or more."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        limits = [load(builder, arguments[1], 4 * part, I32x16) for part in _PARTS]
        return _reached(builder, arguments[0], limits)

    return types.int64(types.int64, types.int64), codegen


def _reached(builder: Any, values: Any, limits: list[Any]) -> Any:
    mask = ir.Constant(I64, 0)
    for part, limit in zip(_PARTS, limits, strict=True):
        some = builder.icmp_signed(">=", load(builder, values, 4 * part, I32x16), limit)
        bits = builder.zext(builder.bitcast(some, I16), I64)
        mask = builder.or_(mask, builder.shl(bits, ir.Constant(I64, part)))
    return mask


@intrinsic
def raise_tops(typing: Any, sims: Any, rows: Any, row_tops: Any, column_tops: Any) -> Any:
    """The highest of each row and of each column of int32 sims [rows ≥ 1, 64]."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.call(_tops_function(builder.module), arguments)
        return ir.Constant(I64, 0)

    return types.int64(*[types.int64] * 4), codegen


def _tops_function(module: Any) -> Any:
    name = "nearkin_tops"
    if name in module.globals:
        return module.globals[name]
    function = new_function(module, name, 4)
    sims, rows, row_tops, column_tops = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    larger = declared(builder, "llvm.smax.v16i32", I32x16, [I32x16] * 2)
    reduce = declared(builder, "llvm.vector.reduce.smax.v16i32", I32, [I32x16])

    def raised(row: Any, tops: list[Any]) -> list[Any]:
        address = builder.add(sims, builder.mul(row, ir.Constant(I64, 4 * MOST)))
        values = [load(builder, address, 4 * LANES * v, I32x16) for v in range(len(tops))]
        top = values[0]
        for value in values[1:]:
            top = builder.call(larger, [top, value])
        place = builder.add(row_tops, builder.mul(row, ir.Constant(I64, 4)))
        store(builder, builder.call(reduce, [top]), place, 0)
        return [builder.call(larger, pair) for pair in zip(tops, values, strict=True)]

    lowest = [ir.Constant(I32x16, [-(2**31)] * LANES)] * (MOST // LANES)
    for v, top in enumerate(_gone_through(builder, function, rows, lowest, raised)):
        store(builder, top, column_tops, 4 * LANES * v)
    builder.ret_void()
    return function


@intrinsic
def first_bit(typing: Any, mask: Any) -> Any:
    """The place of the lowest bit that is set; the mask must not be 0."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(I1, 1))

    return types.int64(types.int64), codegen


class _Chosen:
    """Sixteen of a channel's locations, by their places in vectors of it."""

    def __init__(self, builder: Any, places: Any, number: Any) -> None:
        self._builder = builder
        self._places = load(builder, places, 4 * LANES * number, I32x16)
        self._upper = builder.icmp_signed(">=", self._places, ir.Constant(I32x16, [2 * LANES] * LANES))

    def of(self, vectors: list[Any]) -> Any:
        lower = self._two(vectors[:2])
        upper = self._one(vectors[2]) if len(vectors) == 3 else self._two(vectors[2:])
        return self._builder.select(self._upper, upper, lower)

    def _one(self, vector: Any) -> Any:
        function = declared(self._builder, "llvm.x86.avx512.permvar.sf.512", F32x16, [F32x16, I32x16])
        return self._builder.call(function, [vector, self._places])

    def _two(self, vectors: list[Any]) -> Any:
        name, kinds = "llvm.x86.avx512.vpermi2var.ps.512", [F32x16, I32x16, F32x16]
        return self._builder.call(
            declared(self._builder, name, F32x16, kinds), [vectors[0], self._places, vectors[1]]
        )


@intrinsic
def chosen_sums(
    typing: Any,
    only_pairs: Any,
    vectors: Any,
    others: Any,
    a: Any,
    a_stride: Any,
    a_tail: Any,
    b: Any,
    b_stride: Any,
    b_tail: Any,
    places: Any,
    steps: Any,
    out: Any,
) -> Any:
    """Products of a's locations with chosen ones of b, of b's with chosen ones of a, and of 16 chosen pairs.

    out[i] += sum over steps, in order. Of a there are 3 whole vectors and one more, `a_tail` bytes from
    the first, for pairs, or 4; so of b. places: int32, where the others are, and where the pairs are in a
    and in b. If `only_pairs`, of these alone.
    """

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        only_pairs, vectors, others, *rest = values
        number = builder.add(builder.mul(vectors, ir.Constant(I64, 8)), others)
        number = builder.add(builder.mul(builder.zext(only_pairs, I64), ir.Constant(I64, 64)), number)
        functions = {
            64 * alone + 8 * v + o: _chosen_function(builder.module, v, o, alone)
            for v in _VECTORS
            for o in _VECTORS
            for alone in (False, True)
        }
        return call_one(builder, number, functions, rest)

    return types.int64(types.boolean, *[types.int64] * 11), codegen


def _chosen_function(module: Any, vectors: int, others: int, only_pairs: bool) -> Any:
    name = f"nearkin_chosen_{vectors}_{others}" + ("_pairs" if only_pairs else "")
    if name in module.globals:
        return module.globals[name]
    function = new_function(module, name, 9)
    a, a_stride, a_tail, b, b_stride, b_tail, places, steps, out = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    count = 0 if only_pairs else vectors + others
    chosen = [_Chosen(builder, places, number) for number in range(count + 2)]
    sides = _Side(builder, vectors, a, a_stride, a_tail), _Side(builder, others, b, b_stride, b_tail)

    def products(step: Any, totals: list[Any]) -> list[Any]:
        (one, one_tail), (other, other_tail) = (side.load(step) for side in sides)
        tables = [other] * vectors + [one] * others
        wholes = zip(one + other, chosen[:count], tables, strict=False)
        pairs = [(whole, place.of(table)) for whole, place, table in wholes]
        pairs.append((chosen[count].of(one + one_tail), chosen[count + 1].of(other + other_tail)))
        return [multiply_add(builder, *pair, total) for pair, total in zip(pairs, totals, strict=True)]

    before = [load(builder, out, 4 * LANES * v, F32x16) for v in range(count + 1)]
    for v, total in enumerate(_gone_through(builder, function, steps, before, products)):
        store(builder, total, out, 4 * LANES * v)
    builder.ret_void()
    return function


class _Side:
    """The locations of one map: whole vectors, and one for those beyond them."""

    def __init__(self, builder: Any, vectors: int, start: Any, stride: Any, tail: Any) -> None:
        self._builder, self._vectors = builder, vectors
        self._start, self._stride, self._tail = start, stride, tail

    def load(self, step: Any) -> tuple[list[Any], list[Any]]:
        builder = self._builder
        address = builder.add(self._start, builder.mul(step, self._stride))
        whole = [load(builder, address, 4 * LANES * v, F32x16) for v in range(self._vectors)]
        if self._vectors == MOST // LANES:
            return whole, []
        return whole, [load(builder, builder.add(address, self._tail), 0, F32x16)]


def _gone_through(builder: Any, function: Any, steps: Any, before: list[Any], change: Any) -> list[Any]:
    """What becomes of vectors in `change(step, vectors)`, for all steps, of which there is one at least."""
    start = builder.block
    loop, end = function.append_basic_block("loop"), function.append_basic_block("end")
    builder.branch(loop)
    builder.position_at_end(loop)
    step, vectors = builder.phi(I64), [builder.phi(value.type) for value in before]
    changed: list[Any] = change(step, vectors)
    following = builder.add(step, ir.Constant(I64, 1))
    incoming = zip([step, *vectors], [ir.Constant(I64, 0), *before], [following, *changed], strict=True)
    for value, first, later in incoming:
        value.add_incoming(first, start)
        value.add_incoming(later, loop)
    builder.cbranch(builder.icmp_signed("<", following, steps), loop, end)
    builder.position_at_end(end)
    return changed
