"""Products of 16 int16 rows with 16 others, summed in int32: the innermost loop of engine `mixed`.

On processors with AVX-512 VNNI one instruction multiplies and adds 32 pairs of int16, twice what they do in
float32. With AVX2 one multiplies 16 and another adds, which is one and a half times what they do in float32.
Elsewhere the compiler takes what there is.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from nearkin_service.engines.mixed.simd import everywhere, intrinsic

LANES = 16
"""Rows of a group: the packed keys hold pairs of elements of so many rows side by side."""

_UTMOST = 32766.0

_SHORT, _INT, _LONG = ir.IntType(16), ir.IntType(32), ir.IntType(64)
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


class _Registers(NamedTuple):
    """How 16 rows and 16 columns are gone through.

    Attributes:
        columns: to a register of sums.
        rows: of which sums are in registers at the same time, one after the other.
        pair_sums: the instruction that multiplies two registers of int16 and adds up neighbouring products.
    """

    columns: int
    rows: tuple[int, ...]
    pair_sums: str | None


def _registers(context: Any) -> _Registers:
    """Those of the processor that numba compiles for."""
    told: str = context.codegen()._tm_features  # environment included
    features = told.split(",")
    if "+avx512bw" in features:
        return _Registers(LANES, (LANES,), "llvm.x86.avx512.pmaddw.d.512")
    if "+avx2" in features:
        return _Registers(LANES // 2, (6, 6, 4), "llvm.x86.avx2.pmadd.wd")
    return _Registers(LANES, (LANES,), None)


def _pair_sums(builder: Any, instruction: str | None, first: Any, second: Any) -> Any:
    """The sums of two neighbouring products each."""
    shorts = first.type
    ints = ir.VectorType(_INT, shorts.count // 2)
    if instruction:
        return builder.call(_function(builder, instruction, [shorts, shorts], ints), [first, second])
    total = None
    for odd in (0, 1):
        places = ir.Constant(ints, list(range(odd, shorts.count, 2)))
        sides = [
            builder.sext(builder.shuffle_vector(side, ir.Constant(shorts, ir.Undefined), places), ints)
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
    """Per row of the first group, its products with the rows of the second."""
    registers, sums = _registers(context), list[Any]()
    for count in registers.rows:
        sums += _sums_of_rows(builder, registers, groups, range(len(sums), len(sums) + count))
    return sums


def _sums_of_rows(builder: Any, registers: _Registers, groups: Any, rows: range) -> list[Any]:
    """The same for some rows: a loop over pairs of elements."""
    first, second, pairs = _unpacked(builder, groups, 3)
    width = registers.columns
    shorts, ints = ir.VectorType(_SHORT, 2 * width), ir.VectorType(_INT, width)
    before = builder.block
    loop, after = builder.append_basic_block("products"), builder.append_basic_block("sums")
    builder.branch(loop)
    builder.position_at_end(loop)
    pair = builder.phi(_LONG)
    pair.add_incoming(_LONG(0), before)
    sums = [[builder.phi(ints) for _ in range(0, LANES, width)] for _ in rows]
    offset = builder.mul(pair, _LONG(4 * LANES))
    columns = [
        builder.load(_address(builder, second, builder.add(offset, _LONG(4 * column)), shorts), align=4)
        for column in range(0, LANES, width)
    ]
    added = []
    for row, totals in zip(rows, sums, strict=True):
        two = builder.load(_address(builder, first, builder.add(offset, _LONG(4 * row)), _INT), align=4)
        repeated = builder.bitcast(everywhere(builder, two, ints), shorts)
        products = [_pair_sums(builder, registers.pair_sums, repeated, some) for some in columns]
        added.append([builder.add(*both) for both in zip(totals, products, strict=True)])
    following = builder.add(pair, _LONG(1))
    pair.add_incoming(following, loop)
    for total, value in zip(chain(*sums), chain(*added), strict=True):
        total.add_incoming(ir.Constant(ints, [0] * width), before)
        total.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", following, pairs), loop, after)
    builder.position_at_end(after)
    return [_joined(builder, values) for values in added]


def _joined(builder: Any, halves: list[Any]) -> Any:
    """One vector of one or two."""
    if len(halves) == 1:
        return halves[0]
    return builder.shuffle_vector(*halves, ir.Constant(_INTS, list(range(LANES))))


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
