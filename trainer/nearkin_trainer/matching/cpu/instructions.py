# ruff: noqa: PLR0917 (compiled functions take no keywords)
# mypy: disable-error-code="untyped-decorator,no-untyped-call"
"""Vector instructions that Numba's Python cannot say, written as LLVM for its compiled functions.

All take addresses in bytes. Lanes are 16 float32 wide; LLVM splits them where registers are narrower.

product_tile   sims[r, v] of up to 6 rows against 16, 32, 48 or 64 columns, accumulated in registers
hits           which of 16 approximate sims may be the true maximum of their row or column
highest        the largest of many values
add_both       two rows added to two others at once, each times a weight
transpose_16   a 16 × 16 block of float32, transposed
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic as _intrinsic

intrinsic: Any = _intrinsic  # its own type does not know that the typing context is passed for you
LANES = 16
F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32x16, I32x16 = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BF16x32 = ir.VectorType(_BFloat(), 2 * LANES)

# What Numba compiles for, which is also what its cache is keyed by.
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
HAS_BF16 = "+avx512bf16" in _FEATURES
HAS_AVX512 = "+avx512f" in _FEATURES
# Accumulators must fit the registers: 32 of 16 lanes with AVX-512, else 16 of 8 lanes.
ROWS = 6
MOST_VECTORS = 4 if HAS_AVX512 else 1


def _pointer(builder: Any, address: Any, offset_bytes: int = 0) -> Any:
    if offset_bytes:
        address = builder.add(address, ir.Constant(I64, offset_bytes))
    return builder.inttoptr(address, ir.PointerType())


def _load(builder: Any, address: Any, offset_bytes: int, kind: Any) -> Any:
    return builder.load(_pointer(builder, address, offset_bytes), typ=kind, align=4)


def _store(builder: Any, value: Any, address: Any, offset_bytes: int) -> None:
    builder.store(value, _pointer(builder, address, offset_bytes), align=4)


def _splat(builder: Any, value: Any, kind: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)


def _multiply_add(builder: Any, left: Any, right: Any, total: Any, bf16: bool) -> Any:
    """Total + left · right; in bfloat16 each lane holds a pair of channels."""
    if bf16:
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        operands = [total, builder.bitcast(left, BF16x32), builder.bitcast(right, BF16x32)]
    else:
        name, operands = "llvm.fma.v16f32", [left, right, total]
    function = _declared(builder, name, F32x16, [operand.type for operand in operands])
    return builder.call(function, operands)


def _declared(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """LLVM's own function of that name."""
    kind = ir.FunctionType(result, arguments)
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def _tile_function(module: Any, rows: int, vectors: int, bf16: bool) -> Any:
    """void(a, a_stride, b, b_stride, steps, out, out_stride); one step per 4 bytes of a row of a."""
    name = f"nearkin_tile_{'bf16' if bf16 else 'f32'}_{rows}x{vectors}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 7), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    a, a_stride, b, b_stride, steps, out, out_stride = function.args
    entry, loop, end = (function.append_basic_block(part) for part in ("entry", "loop", "end"))
    lane, vector = (I32, I32x16) if bf16 else (F32, F32x16)

    builder = ir.IRBuilder(entry)
    row_starts = [builder.add(a, builder.mul(a_stride, ir.Constant(I64, row))) for row in range(rows)]
    builder.branch(loop)

    builder.position_at_end(loop)
    step = builder.phi(I64)
    step.add_incoming(ir.Constant(I64, 0), entry)
    sums = [[builder.phi(F32x16) for _ in range(vectors)] for _ in range(rows)]
    b_row = builder.add(b, builder.mul(step, b_stride))
    columns = [_load(builder, b_row, 64 * v, vector) for v in range(vectors)]
    offset = builder.mul(step, ir.Constant(I64, 4))
    for start, row_sums in zip(row_starts, sums, strict=True):
        value = _splat(builder, _load(builder, builder.add(start, offset), 0, lane), vector)
        for total, column in zip(row_sums, columns, strict=True):
            total.add_incoming(ir.Constant(F32x16, [0.0] * LANES), entry)
            total.add_incoming(_multiply_add(builder, value, column, total, bf16), loop)
    after = builder.add(step, ir.Constant(I64, 1))
    step.add_incoming(after, loop)
    builder.cbranch(builder.icmp_signed("<", after, steps), loop, end)

    builder.position_at_end(end)
    for row, row_sums in enumerate(sums):
        start = builder.add(out, builder.mul(out_stride, ir.Constant(I64, row)))
        for v, total in enumerate(row_sums):
            _store(builder, total.incomings[1][0], start, 64 * v)
    builder.ret_void()
    return function


@intrinsic
def product_tile(
    typing: Any,
    rows: Any,
    vectors: Any,
    a: Any,
    a_stride: Any,
    b: Any,
    b_stride: Any,
    steps: Any,
    out: Any,
    out_stride: Any,
) -> Any:
    """out[rows, 16 · vectors] = a · b over `steps` of 4 bytes; rows ≤ ROWS and vectors ≤ MOST_VECTORS."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        rows, vectors, *rest = values
        chosen = builder.add(builder.mul(rows, ir.Constant(I64, 8)), vectors)
        done = builder.append_basic_block("tile_done")
        unreachable = builder.append_basic_block("tile_impossible")
        switch = builder.switch(chosen, unreachable)
        for r in range(1, ROWS + 1):
            for v in range(1, MOST_VECTORS + 1):
                block = builder.append_basic_block(f"tile_{r}_{v}")
                switch.add_case(ir.Constant(I64, 8 * r + v), block)
                with builder.goto_block(block):
                    builder.call(_tile_function(builder.module, r, v, HAS_BF16), rest)
                    builder.branch(done)
        builder.position_at_end(unreachable)
        builder.unreachable()
        builder.position_at_end(done)
        return ir.Constant(I64, 0)

    return types.int64(*[types.int64] * 9), codegen


@intrinsic
def hits(typing: Any, sims: Any, column_bounds: Any, row_bound: Any) -> Any:
    """Bits of the lanes where sims ≥ row_bound or sims ≥ column_bounds."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        sims, column_bounds, row_bound = values
        found = _load(builder, sims, 0, F32x16)
        over_column = builder.fcmp_ordered(">=", found, _load(builder, column_bounds, 0, F32x16))
        over_row = builder.fcmp_ordered(">=", found, _splat(builder, row_bound, F32x16))
        return builder.zext(builder.bitcast(builder.or_(over_column, over_row), I16), I64)

    return types.int64(types.int64, types.int64, types.float32), codegen


@intrinsic
def highest(typing: Any, values: Any, blocks: Any) -> Any:
    """The largest of 16 · blocks float32; blocks ≥ 1."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        values, blocks = arguments
        best = cgutils.alloca_once_value(builder, _load(builder, values, 0, F32x16))
        with cgutils.for_range(builder, blocks) as loop:
            offset = builder.mul(loop.index, ir.Constant(I64, 64))
            found = _load(builder, builder.add(values, offset), 0, F32x16)
            top = builder.load(best)
            builder.store(builder.select(builder.fcmp_ordered(">", found, top), found, top), best)
        reduce = _declared(builder, "llvm.vector.reduce.fmax.v16f32", F32, [F32x16])
        return builder.call(reduce, [builder.load(best)])

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def add_both(
    typing: Any, weight: Any, scaled: Any, a: Any, b: Any, a_gradient: Any, b_gradient: Any, blocks: Any
) -> Any:
    """b_gradient += weight · a and a_gradient += scaled · b, each of 16 · blocks float32."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        weight, scaled, a, b, a_gradient, b_gradient, blocks = arguments
        weights, scaleds = _splat(builder, weight, F32x16), _splat(builder, scaled, F32x16)
        with cgutils.for_range(builder, blocks) as loop:
            offset = builder.mul(loop.index, ir.Constant(I64, 64))
            for factor, source, target in ((weights, a, b_gradient), (scaleds, b, a_gradient)):
                value = _load(builder, builder.add(source, offset), 0, F32x16)
                total = _load(builder, builder.add(target, offset), 0, F32x16)
                total = _multiply_add(builder, factor, value, total, False)
                _store(builder, total, builder.add(target, offset), 0)
        return ir.Constant(I64, 0)

    kinds = [types.float32] * 2 + [types.int64] * 5
    return types.int64(*kinds), codegen


@intrinsic
def lowest_bit(typing: Any, bits: Any) -> Any:
    """Position of the lowest set bit; `bits` must not be 0."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.cttz(values[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


@intrinsic
def float_bits(typing: Any, value: Any) -> Any:
    """The 32 bits of a float32."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.bitcast(values[0], I32)

    return types.uint32(types.float32), codegen


@intrinsic
def transpose_16(typing: Any, source: Any, source_stride: Any, target: Any, target_stride: Any) -> Any:
    """target[j, i] = source[i, j] of a 16 × 16 float32 block; strides in bytes."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        source, source_stride, target, target_stride = values
        rows = []
        for row in range(LANES):
            start = builder.add(source, builder.mul(source_stride, ir.Constant(I64, row)))
            rows.append(_load(builder, start, 0, F32x16))
        for distance in (8, 4, 2, 1):
            rows = _exchanged(builder, rows, distance)
        for row, value in enumerate(rows):
            start = builder.add(target, builder.mul(target_stride, ir.Constant(I64, row)))
            _store(builder, value, start, 0)
        return ir.Constant(I64, 0)

    return types.int64(*[types.int64] * 4), codegen


def _exchanged(builder: Any, rows: list[Any], distance: int) -> list[Any]:
    """Swap the off-diagonal blocks of every 2·distance square: one of four steps of a transpose."""
    upper = [lane if not lane & distance else lane - distance + LANES for lane in range(LANES)]
    lower = [lane + distance if not lane & distance else lane + LANES for lane in range(LANES)]
    result = list(rows)
    for row in range(LANES):
        if not row & distance:
            pair = rows[row], rows[row + distance]
            for target, lanes in ((row, upper), (row + distance, lower)):
                mask = ir.Constant(ir.VectorType(I32, LANES), lanes)
                result[target] = builder.shuffle_vector(*pair, mask)
    return result
