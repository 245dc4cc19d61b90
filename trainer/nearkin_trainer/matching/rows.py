"""Which classes a step touches, and reading just those rows of the table.

N classes, U touched classes (unique, ascending), B probes, M candidates per probe.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


@dataclass(frozen=True)
class Touched:
    """The unique candidates of a step.

    ids: int64 [U], ascending.
    slots: int64 [B, M], position in `ids` of each candidate, −1 where there is none.
    """

    ids: Tensor
    slots: Tensor


def check_range(candidates: Tensor, num_classes: int) -> None:
    """Raises `ValueError` unless all are class ids or −1."""
    if candidates.numel():
        low, high = (int(bound) for bound in torch.aminmax(candidates))
        if low < -1 or high >= num_classes:
            raise ValueError(
                f"candidates must lie in [-1, {num_classes - 1}], found {low if low < -1 else high}"
            )


def touched_classes(candidates_BM: Tensor) -> Touched:
    """The distinct classes among the candidates; costs O(B·M·log), nothing per class of the table."""
    present_BM = candidates_BM >= 0
    ids_U, inverse = torch.unique(candidates_BM[present_BM], return_inverse=True)
    slots_BM = torch.full_like(candidates_BM, -1)
    slots_BM[present_BM] = inverse
    return Touched(ids_U, slots_BM)


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, table: Tensor, ids_U: Tensor, sparse: bool) -> Tensor:
        ctx.save_for_backward(ids_U)
        ctx.shape, ctx.sparse = table.shape, sparse  # type: ignore[attr-defined]
        return table.index_select(0, ids_U)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None]:
        (ids_U,) = ctx.saved_tensors
        return rows_gradient(ids_U, grad_rows, ctx.shape, sparse=ctx.sparse), None, None


def take_rows(table: Tensor, ids_U: Tensor, *, sparse: bool = True) -> Tensor:
    """`table[ids_U]` whose gradient holds the rows read and no others; `ids_U` unique and ascending."""
    rows: Tensor = _TakeRows.apply(table, ids_U, sparse)  # type: ignore[no-untyped-call]
    return rows


def rows_gradient(ids_U: Tensor, rows: Tensor, shape: torch.Size, *, sparse: bool) -> Tensor:
    """The gradient of a whole table of `shape` from the gradients of its touched rows."""
    if not sparse:
        return rows.new_zeros(shape).index_copy_(0, ids_U, rows)
    return torch.sparse_coo_tensor(ids_U[None], rows, shape, is_coalesced=True, check_invariants=False)


Gradients = tuple[Tensor | None, ...]


def first_derivative(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Marks the backward pass of a compiled operation: what it returns cannot be differentiated again.

    PyTorch's `once_differentiable` takes it for a constant where the incoming gradient is one: a penalty on
    gradients would change nothing, without a word. Here whoever differentiates it is told.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *incoming: Tensor) -> Gradients:
        with torch.no_grad():
            found = backward(ctx, *incoming)
        if not torch.is_grad_enabled():
            return found
        inputs = [t for t in (*incoming, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return tuple(None if gradient is None else _OnlyFirst.apply(gradient, *inputs) for gradient in found)  # type: ignore[no-untyped-call]

    return wrapper


class _OnlyFirst(Function):
    @staticmethod
    def forward(_ctx: FunctionCtx, gradient: Tensor, *_inputs: Tensor) -> Tensor:
        return gradient.detach()

    @staticmethod
    def backward(_ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "this backend of location_maxima has first derivatives only; "
            "for those of gradients use backend='plain'"
        )
