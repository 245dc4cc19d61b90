"""Instructions that numba lacks, in portable LLVM: compare 32 numbers, count, find bits, share counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

WIDTH = 32


def intrinsic(function: Callable[..., Any]) -> Any:
    """Numba's, which has no types."""
    return _intrinsic(function)


def everywhere(builder: Any, value: Any, vector: Any) -> Any:
    """A vector that holds one value in all its places."""
    undefined, first = ir.Constant(vector, ir.Undefined), ir.IntType(32)(0)
    one = builder.insert_element(undefined, value, first)
    places = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, undefined, places)


_VECTOR = ir.VectorType(ir.IntType(16), WIDTH)
_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_MASK = ir.IntType(WIDTH)


def _load(builder: Any, address: Any) -> Any:
    pointer = builder.inttoptr(address, cgutils.voidptr_t)
    return builder.load(pointer, typ=_VECTOR, align=2)


@intrinsic
def above(typing: Any, address: Any, limit: Any) -> Any:
    """Bit b of the result: the b-th of 32 int16 from `address` on is greater than `limit`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        limits = everywhere(builder, arguments[1], _VECTOR)
        return builder.bitcast(builder.icmp_signed(">", _load(builder, arguments[0]), limits), _MASK)

    return types.uint32(types.intp, types.int16), generate


@intrinsic
def above_each(typing: Any, address: Any, limits_address: Any) -> Any:
    """Bit b of the result: the b-th of 32 int16 is greater than the b-th of 32 limits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, limits = _load(builder, arguments[0]), _load(builder, arguments[1])
        return builder.bitcast(builder.icmp_signed(">", values, limits), _MASK)

    return types.uint32(types.intp, types.intp), generate


@intrinsic
def reaching(typing: Any, address: Any, least: Any) -> Any:
    """Bit b of the result: the b-th of 32 float32 from `address` on is `least` or more."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], cgutils.voidptr_t)
        values = builder.load(pointer, typ=_FLOATS, align=4)
        leasts = everywhere(builder, arguments[1], _FLOATS)
        return builder.bitcast(builder.fcmp_ordered(">=", values, leasts), _MASK)

    return types.uint32(types.intp, types.float32), generate


@intrinsic
def take(typing: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at `address` as one step among all threads; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.int64(types.intp, types.int64), generate


@intrinsic
def count_bits(typing: Any, mask: Any) -> Any:
    """How many bits are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.ctpop(arguments[0]), ir.IntType(64))

    return types.int64(types.uint32), generate


@intrinsic
def first_bit(typing: Any, mask: Any) -> Any:
    """The place of the lowest bit that is set; the mask must not be 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return types.int64(types.uint32), generate
