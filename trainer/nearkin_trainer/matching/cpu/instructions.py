# ruff: noqa: PLR0917 (compiled functions take no keywords)
# mypy: disable-error-code="untyped-decorator,no-untyped-call"
"""Vector instructions that Numba's Python cannot say, written as LLVM for its compiled functions.

All take addresses in bytes. Lanes are 16 float32 wide; LLVM splits them where registers are narrower.

product_tile  products of a few rows with a few vectors of columns, accumulated in registers
square_sums   the squared lengths of up to 64 columns
row_maximum   the maximum of a row of sims and its place, while those of the columns are kept up
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic as _intrinsic

intrinsic: Any = _intrinsic  # its own type does not know that the typing context is passed for you
LANES = 16
BLOCK = 2 * LANES  # channels that gradients go through at a time
LINE = 64  # bytes of a cache line
F32, I1, I16, I32, I64 = ir.FloatType(), ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32x16, I32x16 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
I16x32 = ir.VectorType(I16, 2 * LANES)


# What Numba compiles for, which is also what its cache is keyed by.
_, PROCESSOR, _features = cpu_target.target_context.codegen().magic_tuple()
_FEATURES = _features.split(",")
HAS_AVX512 = "+avx512f" in _FEATURES
# Multiplies 32 pairs of int16 as one instruction, in place of 16 of float32.
HAS_VNNI = HAS_AVX512 and {"+avx512bw", "+avx512vnni"} <= set(_FEATURES)
# Accumulators must fit the registers: 32 of 16 lanes with AVX-512, else 16 of 8 lanes.
ROWS = 8 if HAS_AVX512 else 6
MOST_VECTORS = 3 if HAS_AVX512 else 1
# A tile of few rows takes more vectors: how many one of 1, 2, … rows takes.
FEW_VECTORS = (4, 4, 4, 4) if HAS_AVX512 else (4, 3, 2)
FEW_ROWS = len(FEW_VECTORS)
_TILES = [
    (rows, vectors)
    for rows in range(1, ROWS + 1)
    for vectors in range(1, (FEW_VECTORS[rows - 1] if rows <= FEW_ROWS else MOST_VECTORS) + 1)
]
# In fixed point, maps have 48 to 52 or 64 locations. What is never called takes time to compile.
_FIXED_TILES = [(7, 2), (7, 3), (8, 2), (8, 3), (1, 4), (2, 4), (3, 4), (4, 4)] if HAS_VNNI else []
# Channels that all tiles of a pair of maps go through at a time. Where a tile is small, it needs so much
# of the maps for each product that they have to lie in the innermost cache.
STEPS = 1 << 15 if HAS_AVX512 else 64


def pointer(builder: Any, address: Any, offset_bytes: int = 0) -> Any:
    if offset_bytes:
        address = builder.add(address, ir.Constant(I64, offset_bytes))
    return builder.inttoptr(address, ir.PointerType())


def load(builder: Any, address: Any, offset_bytes: int, kind: Any) -> Any:
    return builder.load(pointer(builder, address, offset_bytes), typ=kind, align=4)


def store(builder: Any, value: Any, address: Any, offset_bytes: int) -> None:
    builder.store(value, pointer(builder, address, offset_bytes), align=4)


def splat(builder: Any, value: Any, kind: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def multiply_add(builder: Any, left: Any, right: Any, total: Any) -> Any:
    kind = total.type
    if kind == I32x16:
        halves = [builder.bitcast(side, I16x32) for side in (left, right)]
        function = declared(builder, "llvm.x86.avx512.pmaddw.d.512", I32x16, [I16x32] * 2)
        return builder.add(total, builder.call(function, halves))
    function = declared(builder, f"llvm.fma.v{kind.count}f32", kind, [kind] * 3)
    return builder.call(function, [left, right, total])


def declared(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """LLVM's own function of that name."""
    kind = ir.FunctionType(result, arguments)
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def prefetch(builder: Any, address: Any) -> None:
    function = declared(builder, "llvm.prefetch.p0", ir.VoidType(), [ir.PointerType(), I32, I32, I32])
    read, near, data = ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)
    builder.call(function, [pointer(builder, address), read, near, data])


def new_function(module: Any, name: str, arguments: int) -> Any:
    """One that takes so many int64 and returns nothing; it is called and not written into its callers."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    return function


def call_one(builder: Any, number: Any, functions: dict[int, Any], arguments: list[Any]) -> Any:
    """Calls the function of this number, which has to be one of theirs."""
    done = builder.append_basic_block("called")
    impossible = builder.append_basic_block("impossible")
    switch = builder.switch(number, impossible)
    for each, function in functions.items():
        block = builder.append_basic_block("call")
        switch.add_case(ir.Constant(I64, each), block)
        with builder.goto_block(block):
            builder.call(function, arguments)
            builder.branch(done)
    builder.position_at_end(impossible)
    builder.unreachable()
    builder.position_at_end(done)
    return ir.Constant(I64, 0)


class _Columns:
    """`vectors` vectors of columns, of which the last may overlap the one before."""

    def __init__(self, builder: Any, vectors: int, last: Any) -> None:
        self._offsets = [ir.Constant(I64, 4 * LANES * v) for v in range(vectors - 1)] + [last]
        self._builder = builder

    def load(self, address: Any, kind: Any) -> list[Any]:
        add = self._builder.add
        return [load(self._builder, add(address, offset), 0, kind) for offset in self._offsets]

    def store(self, values: list[Any], address: Any) -> None:
        for value, offset in zip(values, self._offsets, strict=True):
            store(self._builder, value, self._builder.add(address, offset), 0)


def _tile_function(module: Any, rows: int, vectors: int, kind: Any) -> Any:
    """void(a, a_stride, b, b_stride, last, steps, out, out_stride, begins, ahead, pace)."""
    name = f"nearkin_tile_{rows}x{vectors}_{kind.element}"
    if name in module.globals:
        return module.globals[name]
    function = new_function(module, name, 11)
    a, a_stride, b, b_stride, last, steps, out, out_stride, begins, ahead, pace = function.args
    parts = ("entry", "resume", "loop", "end")
    entry, resume, loop, end = (function.append_basic_block(part) for part in parts)

    builder = ir.IRBuilder(entry)
    columns = _Columns(builder, vectors, last)
    starts = [builder.add(out, builder.mul(out_stride, ir.Constant(I64, row))) for row in range(rows)]
    builder.cbranch(builder.trunc(begins, I1), loop, resume)

    builder.position_at_end(resume)
    before = [columns.load(start, kind) for start in starts]
    builder.branch(loop)

    builder.position_at_end(loop)
    step, a_row, b_row, next_line = (builder.phi(I64) for _ in range(4))
    sums = [[builder.phi(kind) for _ in range(vectors)] for _ in range(rows)]
    moving = ((step, ir.Constant(I64, 0), ir.Constant(I64, 1)), (a_row, a, a_stride), (b_row, b, b_stride))
    for value, start, stride in (*moving, (next_line, ahead, pace)):
        value.add_incoming(start, entry)
        value.add_incoming(start, resume)
        value.add_incoming(builder.add(value, stride), loop)
    prefetch(builder, next_line)
    values = columns.load(b_row, kind)
    for row, (row_sums, row_before) in enumerate(zip(sums, before, strict=True)):
        one = splat(builder, load(builder, a_row, 4 * row, kind.element), kind)
        for total, value, so_far in zip(row_sums, values, row_before, strict=True):
            total.add_incoming(ir.Constant(kind, None), entry)
            total.add_incoming(so_far, resume)
            total.add_incoming(multiply_add(builder, one, value, total), loop)
    builder.cbranch(builder.icmp_signed("<", step.incomings[-1][0], steps), loop, end)

    builder.position_at_end(end)
    for start, row_sums in zip(starts, sums, strict=True):
        columns.store([total.incomings[-1][0] for total in row_sums], start)
    builder.ret_void()
    return function


@intrinsic
def product_tile(
    typing: Any,
    kind: Any,
    rows: Any,
    vectors: Any,
    a: Any,
    a_stride: Any,
    b: Any,
    b_stride: Any,
    last: Any,
    steps: Any,
    out: Any,
    out_stride: Any,
    begins: Any,
    ahead: Any,
    pace: Any,
) -> Any:
    """out[r, column] += sum over steps of a[step, r] · b[step, column]; if it `begins`, = instead of +=.

    rows ≤ ROWS and vectors ≤ MOST_VECTORS, or rows ≤ FEW_ROWS and vectors ≤ FEW_VECTORS[rows − 1]. The last
    vector lies `last` bytes from the first. Each sum runs through the steps in order, wherever they are cut,
    so that equal locations have equal sims. From `ahead` on, memory is fetched that will be read soon,
    `pace` bytes at each step.
    """

    def codegen(_context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, rows, vectors, *rest = values
        chosen = builder.add(builder.mul(rows, ir.Constant(I64, 8)), vectors)
        kind, sizes = (F32x16, _TILES) if signature.args[0] == types.float32 else (I32x16, _FIXED_TILES)
        functions = {8 * r + v: _tile_function(builder.module, r, v, kind) for r, v in sizes}
        return call_one(builder, chosen, functions, rest)

    return types.int64(kind, *[types.int64] * 13), codegen


@intrinsic
def square_sums(typing: Any, vectors: Any, a: Any, stride: Any, last: Any, steps: Any, out: Any) -> Any:
    """out[column] = sum over steps of a[step, column]²; 1 ≤ vectors ≤ 4, laid out as for `product_tile`."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        vectors, *rest = values
        functions = {v: _squares_function(builder.module, v) for v in range(1, 5)}
        return call_one(builder, vectors, functions, rest)

    return types.int64(*[types.int64] * 6), codegen


def _squares_function(module: Any, vectors: int) -> Any:
    name = f"nearkin_squares_{vectors}"
    if name in module.globals:
        return module.globals[name]
    function = new_function(module, name, 5)
    a, stride, last, steps, out = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    columns = _Columns(builder, vectors, last)
    zero = ir.Constant(F32x16, [0.0] * LANES)
    # Two sums, of even and of odd steps: one alone would wait for itself.
    totals = [cgutils.alloca_once_value(builder, zero) for _ in range(2 * vectors)]

    def add(step: Any, sums: list[Any]) -> None:
        address = builder.add(a, builder.mul(step, stride))
        for value, total in zip(columns.load(address, F32x16), sums, strict=True):
            builder.store(multiply_add(builder, value, value, builder.load(total)), total)

    with cgutils.for_range(builder, builder.lshr(steps, ir.Constant(I64, 1))) as loop:
        even = builder.shl(loop.index, ir.Constant(I64, 1))
        add(even, totals[:vectors])
        add(builder.add(even, ir.Constant(I64, 1)), totals[vectors:])
    with builder.if_then(builder.trunc(steps, I1)):
        add(builder.sub(steps, ir.Constant(I64, 1)), totals[:vectors])
    pairs = zip(totals[:vectors], totals[vectors:], strict=True)
    columns.store([builder.fadd(builder.load(one), builder.load(other)) for one, other in pairs], out)
    builder.ret_void()
    return function


@intrinsic
def row_maximum(
    typing: Any,
    row: Any,
    sims: Any,
    blocks: Any,
    valid: Any,
    scale: Any,
    column_maxima: Any,
    column_places: Any,
    place: Any,
) -> Any:
    """The maximum of scale · sims[16 · blocks], and the first place where it is, int32 stored at `place`.

    Bit i of `valid` tells whether lane i of the last block counts. float32 `column_maxima` and int32
    `column_places` are kept up: a sim that is larger than its column's so far becomes it, at place `row`.
    """

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        row, sims, blocks, valid, scale, column_maxima, column_places, place = arguments
        rows = splat(builder, builder.trunc(row, I32), I32x16)
        scales = splat(builder, scale, F32x16)
        lowest = ir.Constant(F32x16, [float("-inf")] * LANES)
        best = cgutils.alloca_once_value(builder, lowest)
        mask = builder.bitcast(builder.trunc(valid, I16), ir.VectorType(I1, LANES))
        last = builder.sub(blocks, ir.Constant(I64, 1))

        def scaled(index: Any) -> tuple[Any, Any]:
            offset = builder.mul(index, ir.Constant(I64, 4 * LANES))
            return offset, builder.fmul(load(builder, builder.add(sims, offset), 0, F32x16), scales)

        def highest(one: Any, other: Any) -> Any:
            if HAS_AVX512:
                return builder.select(builder.fcmp_ordered(">", one, other), one, other)
            # Of a choice LLVM makes a masked store, which costs a dozen cycles on AVX2.
            function = declared(builder, "llvm.maxnum.v16f32", F32x16, [F32x16] * 2)
            return builder.call(function, [one, other], fastmath=("nnan",))

        def take(index: Any, masked: bool) -> None:
            offset, found = scaled(index)
            found = builder.select(mask, found, lowest) if masked else found
            columns, places = builder.add(column_maxima, offset), builder.add(column_places, offset)
            before = load(builder, columns, 0, F32x16)
            places_before = load(builder, places, 0, I32x16)
            store(builder, highest(found, before), columns, 0)
            larger = builder.fcmp_ordered(">", found, before)
            store(builder, builder.select(larger, rows, places_before), places, 0)
            builder.store(highest(found, builder.load(best)), best)

        with cgutils.for_range(builder, last) as loop:
            take(loop.index, False)
        take(last, True)
        reduce = declared(builder, "llvm.vector.reduce.fmax.v16f32", F32, [F32x16])
        top = builder.call(reduce, [builder.load(best)], fastmath=("nnan",))

        tops = splat(builder, top, F32x16)
        first = cgutils.alloca_once_value(builder, ir.Constant(I32, 0))

        def find(index: Any, masked: bool) -> None:
            equal = builder.fcmp_ordered("==", scaled(index)[1], tops)
            equal = builder.and_(equal, mask) if masked else equal
            bits = builder.zext(builder.bitcast(equal, I16), I32)
            lane = builder.cttz(bits, ir.Constant(I1, 0))
            here = builder.add(builder.mul(builder.trunc(index, I32), ir.Constant(I32, LANES)), lane)
            some = builder.icmp_unsigned("!=", bits, ir.Constant(I32, 0))
            builder.store(builder.select(some, here, builder.load(first)), first)

        # Backwards, so that the first of equal places is what remains.
        find(last, True)
        with cgutils.for_range(builder, last) as loop:
            find(builder.sub(builder.sub(last, loop.index), ir.Constant(I64, 1)), False)
        builder.store(builder.load(first), pointer(builder, place), align=4)
        return top

    kinds = [*[types.int64] * 4, types.float32, *[types.int64] * 3]
    return types.float32(*kinds), codegen
