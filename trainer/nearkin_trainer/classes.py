"""The class-embedding table: one feature map per class, the same bits on every process.

`ClassEmbeddings.weight` is `[num_classes, C, H, W]`. It is kept in one of two ways:

    learnable   rows follow their gradient; a row-wise optimiser touches only the rows that a step has read
    memory      rows follow the features of their class's images; no gradient

Nothing in a step costs O(num_classes): processes exchange (ids, rows) of what they touched and apply the same
update in the same order, so that the replicas stay identical without ever being compared.

Legend: N classes, C channels, H x W feature map, U touched classes (unique, ascending), B images.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from nearkin_trainer.distributed import World, gather_rows, sum_over_ranks

Keeping = Literal["learnable", "memory"]


@dataclass(frozen=True)
class Rows:
    """Some rows of a table: `ids` int64 `[U]`, unique and ascending; `values` `[U, C, H, W]`."""

    ids: torch.Tensor
    values: torch.Tensor


class ClassEmbeddings(nn.Module):
    """The table.

    Args:
        num_classes, channels, height, width: its shape.
        keeping: `learnable` or `memory`.

    Attributes:
        weight: float32 `[N, C, H, W]`; normal noise until `start_from` or the first steps fill it.
        seen: bool `[N]`; whether the row means anything yet. Rows never seen are absent from the neighbour
            table.
    """

    weight: nn.Parameter
    seen: torch.Tensor

    def __init__(
        self, num_classes: int, channels: int, height: int, width: int, keeping: Keeping = "learnable"
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: at least 2 classes are needed to tell them apart")
        self.keeping = keeping
        rows = torch.randn(num_classes, channels, height, width) / channels**0.5
        self.weight = nn.Parameter(rows, requires_grad=keeping == "learnable")
        self.register_buffer("seen", torch.full((num_classes,), keeping == "learnable"))

    @property
    def num_classes(self) -> int:
        """N."""
        return int(self.weight.shape[0])

    @torch.no_grad()
    def start_from(self, world: World, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Sets each row to the mean feature of its class.

        Args:
            world: the job; the processes' batches are put together.
            batches: `(features [B, C, H, W], labels int64 [B])` of this process. Classes without any keep
                their row.
        """
        sums = torch.zeros_like(self.weight)
        counts = torch.zeros(self.num_classes, device=self.weight.device)
        for features, labels in batches:
            sums.index_add_(0, labels, F.normalize(features.float(), dim=1))
            counts.index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
        sum_over_ranks(world, sums)
        sum_over_ranks(world, counts)
        met = counts > 0
        self.weight[met] = sums[met] / counts[met].view(-1, 1, 1, 1)
        self.seen |= met

    @torch.no_grad()
    def remember(self, rows: Rows, momentum: float) -> None:
        """Moves rows to `momentum * old + (1 - momentum) * new`; a row never seen before, to new."""
        old = self.weight[rows.ids]
        keep = torch.where(self.seen[rows.ids], momentum, 0.0).view(-1, 1, 1, 1)
        self.weight[rows.ids] = keep * old + (1 - keep) * rows.values
        self.seen[rows.ids] = True

    def absent(self, rows: slice) -> torch.Tensor:
        """Ids within `rows` that have no embedding yet; int64."""
        ids: torch.Tensor = torch.nonzero(~self.seen[rows]).flatten() + rows.start
        return ids

    def take_gradient(self, world: World) -> Rows | None:
        """The mean over processes of the gradient rows of the step just done, and forgets them."""
        gradient = self.weight.grad
        self.weight.grad = None
        mine = _no_rows(self.weight) if gradient is None else _sparse_rows(gradient)
        rows = exchange(world, mine)
        return Rows(rows.ids, rows.values / world.size) if len(rows.ids) else None


def class_means(features_BCHW: torch.Tensor, labels_B: torch.Tensor) -> Rows:
    """The mean over each class's images in a batch of their features, each location L2-normalised."""
    ids_U, inverse_B, counts_U = torch.unique(labels_B, return_inverse=True, return_counts=True)
    normed = F.normalize(features_BCHW.detach().float(), dim=1)
    sums = normed.new_zeros(len(ids_U), *normed.shape[1:]).index_add_(0, inverse_B, normed)
    return Rows(ids_U, sums / counts_U.view(-1, 1, 1, 1))


def exchange(world: World, rows: Rows, *, average: bool = False) -> Rows:
    """The sum (or the mean) over processes of rows by id; the same bits on every process.

    Args:
        world: the job.
        rows: what this process touched.
        average: divide each row by the number of processes that touched it.
    """
    if world.size == 1:
        return rows
    ids = gather_rows(world, rows.ids)
    values = gather_rows(world, rows.values)
    union = torch.unique(torch.cat(ids))
    total = values[0].new_zeros(len(union), *rows.values.shape[1:])
    counts = total.new_zeros(len(union))
    # Process by process: ids are unique within one, so no sum depends on the order in which threads arrive.
    for part_ids, part in zip(ids, values, strict=True):
        slots = torch.searchsorted(union, part_ids)
        total.index_add_(0, slots, part)
        counts.index_add_(0, slots, torch.ones_like(slots, dtype=counts.dtype))
    return Rows(union, total / counts.view(-1, 1, 1, 1) if average else total)


def _sparse_rows(gradient: torch.Tensor) -> Rows:
    assert gradient.is_sparse, "the class table's gradient is a sparse tensor over dimension 0"
    gradient = gradient.coalesce()
    return Rows(gradient.indices()[0], gradient.values())


def _no_rows(table: torch.Tensor) -> Rows:
    return Rows(torch.zeros(0, dtype=torch.int64, device=table.device), table.new_zeros(0, *table.shape[1:]))


class RowOptimiser(nn.Module):
    """Updates the rows of a table that a step has touched, and no others.

    Its state is buffers, so that `state_dict` saves it. Rows that are not touched keep row and state as they
    are.
    """

    def update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        """Moves `table[gradient.ids]` against its gradient by learning rate `rate`."""
        raise NotImplementedError


class RowSGD(RowOptimiser):
    """Stochastic gradient descent; with momentum, each row's velocity moves only when the row does."""

    velocity: torch.Tensor

    def __init__(self, table: torch.Tensor, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("velocity", torch.zeros_like(table, requires_grad=False))

    @torch.no_grad()
    def update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        velocity = self.momentum * self.velocity[gradient.ids] + gradient.values
        self.velocity[gradient.ids] = velocity
        table.index_add_(0, gradient.ids, velocity, alpha=-rate)


class RowAdagrad(RowOptimiser):
    """Adagrad with one number per row: the sum of the mean squared gradients."""

    squares: torch.Tensor

    def __init__(self, table: torch.Tensor, epsilon: float = 1e-10) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.register_buffer("squares", torch.zeros(table.shape[0], device=table.device))

    @torch.no_grad()
    def update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        squares = self.squares[gradient.ids] + gradient.values.square().flatten(1).mean(1)
        self.squares[gradient.ids] = squares
        scale = (squares.sqrt() + self.epsilon).view(-1, 1, 1, 1)
        table.index_add_(0, gradient.ids, gradient.values / scale, alpha=-rate)


class RowAdam(RowOptimiser):
    """Adam whose moments and step count are the row's own: a row that rests does not age."""

    first: torch.Tensor
    second: torch.Tensor
    steps: torch.Tensor

    def __init__(
        self, table: torch.Tensor, beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
    ) -> None:
        super().__init__()
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        self.register_buffer("first", torch.zeros_like(table, requires_grad=False))
        self.register_buffer("second", torch.zeros_like(table, requires_grad=False))
        self.register_buffer("steps", torch.zeros(table.shape[0], device=table.device))

    @torch.no_grad()
    def update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        ids, values = gradient.ids, gradient.values
        steps = self.steps[ids] + 1
        first = self.first[ids].lerp_(values, 1 - self.beta1)
        second = self.second[ids].mul_(self.beta2).addcmul_(values, values, value=1 - self.beta2)
        self.steps[ids], self.first[ids], self.second[ids] = steps, first, second
        steps = steps.double().view(-1, 1, 1, 1)  # 1 - 0.999 ** 1 has few digits left in float32
        deviation = second.div_((1 - self.beta2**steps).float()).sqrt_().add_(self.epsilon)
        scale = (1 - self.beta1**steps).float()
        table.index_add_(0, ids, first.div_(deviation).div_(scale), alpha=-rate)


RowOptimiserName = Literal["sgd", "adagrad", "adam"]
ROW_OPTIMISERS: dict[str, type[RowSGD] | type[RowAdagrad] | type[RowAdam]] = {
    "sgd": RowSGD,
    "adagrad": RowAdagrad,
    "adam": RowAdam,
}
