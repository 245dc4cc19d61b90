"""Products of 16 int16 rows with 16 others, summed in int32: the innermost loop of engine `mixed`.

On processors with AVX-512 VNNI one instruction multiplies and adds 32 pairs of int16, twice what they do in
float32; 16 of them are under way at once. Elsewhere the compiler takes what there is.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from nearkin_service.engines.mixed.simd import everywhere, intrinsic

LANES = 16
"""Rows of a group: the packed keys hold pairs of elements of so many rows side by side."""

_UTMOST = 32766.0

_SHORT, _INT, _LONG = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_SHORTS = ir.VectorType(_SHORT, 2 * LANES)
_INTS = ir.VectorType(_INT, LANES)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_HALVES = ir.VectorType(_SHORT, LANES)


def _address(builder: Any, base: Any, offset: Any, kind: Any) -> Any:
    return builder.inttoptr(builder.add(base, offset), kind.as_pointer())


def _function(builder: Any, name: str, takes: list[Any], gives: Any) -> Any:
    kind = ir.FunctionType(gives, takes)
    return cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]


def _unpacked(builder: Any, values: Any, count: int) -> list[Any]:
    return list(cgutils.unpack_tuple(builder, values, count))  # type: ignore[no-untyped-call]


def _has_wide_integers(context: Any) -> bool:
    """Whether numba compiles for AVX-512's instructions on bytes and words."""
    features: str = context.codegen()._tm_features  # what numba was told, environment included
    return "+avx512bw" in features.split(",")


def _pair_sums(context: Any, builder: Any, first: Any, second: Any) -> Any:
    """The 16 sums of two neighbouring products each."""
    if _has_wide_integers(context):
        of_pairs = _function(builder, "llvm.x86.avx512.pmaddw.d.512", [_SHORTS, _SHORTS], _INTS)
        return builder.call(of_pairs, [first, second])
    total = None
    for odd in (0, 1):
        places = ir.Constant(ir.VectorType(_INT, LANES), list(range(odd, 2 * LANES, 2)))
        sides = [
            builder.sext(builder.shuffle_vector(side, ir.Constant(_SHORTS, ir.Undefined), places), _INTS)
            for side in (first, second)
        ]
        product = builder.mul(*sides)
        total = product if total is None else builder.add(total, product)
    return total


@intrinsic
def add_group_products(typing: Any, groups: Any, sums: Any, begins: Any) -> Any:
    """Add to float32 sums the products of the rows of two groups; if it `begins`, to nothing.

    `groups` is where both begin, each [pairs, 16, 2] int16, and how many pairs of elements there are, one at
    least. `sums` is where the first sum lies, and how many bytes one row's are from the next one's.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        totals = _integer_sums(context, builder, arguments[0])
        nothing = ir.Constant(_FLOATS, [0.0] * LANES)
        for total, place in zip(totals, _places(builder, arguments[1], _FLOATS), strict=True):
            before = builder.select(arguments[2], nothing, builder.load(place, align=4))
            builder.store(builder.fadd(before, builder.sitofp(total, _FLOATS)), place, align=4)
        return context.get_dummy_value()

    return types.void(groups, sums, types.boolean), generate


@intrinsic
def put_group_products(typing: Any, groups: Any, scales: Any, tile: Any) -> Any:
    """Write the products of two groups, scaled and rounded to int16.

    `scales` is where the float32 scales of both groups' rows begin; `tile` is like the sums.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        totals = _integer_sums(context, builder, arguments[0])
        _put_scaled(builder, [builder.sitofp(total, _FLOATS) for total in totals], *arguments[1:])
        return context.get_dummy_value()

    return types.void(groups, scales, tile), generate


@intrinsic
def put_group_sums(typing: Any, sums: Any, scales: Any, tile: Any) -> Any:
    """Write the sums that `add_group_products` made, scaled and rounded to int16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        totals = [builder.load(place, align=4) for place in _places(builder, arguments[0], _FLOATS)]
        _put_scaled(builder, totals, *arguments[1:])
        return context.get_dummy_value()

    return types.void(sums, scales, tile), generate


def _places(builder: Any, start: Any, kind: Any) -> list[Any]:
    """Pointers to 16 rows' vectors."""
    first, stride = _unpacked(builder, start, 2)
    return [_address(builder, first, builder.mul(stride, _LONG(row)), kind) for row in range(LANES)]


def _integer_sums(context: Any, builder: Any, groups: Any) -> list[Any]:
    first, second, pairs = _unpacked(builder, groups, 3)
    before = builder.block
    loop, after = builder.append_basic_block("products"), builder.append_basic_block("sums")
    builder.branch(loop)
    builder.position_at_end(loop)
    pair = builder.phi(_LONG)
    pair.add_incoming(_LONG(0), before)
    sums = [builder.phi(_INTS) for _ in range(LANES)]
    offset = builder.mul(pair, _LONG(4 * LANES))
    columns = builder.load(_address(builder, second, offset, _SHORTS), align=4)
    added = []
    for row, total in enumerate(sums):
        total.add_incoming(ir.Constant(_INTS, [0] * LANES), before)
        two = builder.load(_address(builder, first, builder.add(offset, _LONG(4 * row)), _INT), align=4)
        repeated = builder.bitcast(everywhere(builder, two, _INTS), _SHORTS)
        added.append(builder.add(total, _pair_sums(context, builder, repeated, columns)))
    following = builder.add(pair, _LONG(1))
    pair.add_incoming(following, loop)
    for total, value in zip(sums, added, strict=True):
        total.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after)
    builder.position_at_end(after)
    return added


def _put_scaled(builder: Any, sums: list[Any], scales: Any, tile: Any) -> None:
    own_scales, other_scales = _unpacked(builder, scales, 2)
    to_nearest = _function(builder, "llvm.rint.v16f32", [_FLOATS], _FLOATS)
    columns = builder.load(_address(builder, other_scales, _LONG(0), _FLOATS), align=4)
    for row, place in enumerate(_places(builder, tile, _HALVES)):
        own = builder.load(_address(builder, own_scales, _LONG(4 * row), ir.FloatType()), align=4)
        value = builder.fmul(builder.fmul(sums[row], everywhere(builder, own, _FLOATS)), columns)
        for sign, order in ((1.0, "<"), (-1.0, ">")):  # errors of very wide keys may lead beyond an int16
            limit = ir.Constant(_FLOATS, [sign * _UTMOST] * LANES)
            value = builder.select(builder.fcmp_ordered(order, value, limit), value, limit)
        steps = builder.fptosi(builder.call(to_nearest, [value]), _INTS)
        builder.store(builder.trunc(steps, _HALVES), place, align=2)
