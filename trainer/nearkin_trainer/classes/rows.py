"""Some rows of the class table: the means of a batch, and sums over processes.

Legend: C channels, H x W feature map, U touched classes (unique, ascending), B images.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nearkin_trainer.distributed import World, gather_rows


@dataclass(frozen=True)
class Rows:
    """Some rows of a table: `ids` int64 `[U]`, unique and ascending; `values` `[U, C, H, W]`."""

    ids: torch.Tensor
    values: torch.Tensor

    def over(self, count: int) -> "Rows":
        """Divided by `count`, and not copied for 1."""
        return self if count == 1 else Rows(self.ids, self.values / count)


def class_means(features_BCHW: torch.Tensor, labels_B: torch.Tensor) -> Rows:
    """The mean over each class's images in a batch of their features, each location L2-normalised."""
    sums, counts_U = class_sums(features_BCHW, labels_B)
    return Rows(sums.ids, sums.values / counts_U.view(-1, 1, 1, 1))


def class_sums(features_BCHW: torch.Tensor, labels_B: torch.Tensor) -> tuple[Rows, torch.Tensor]:
    """The sum over each class's images of their features, each location L2-normalised; how many those are."""
    ids_U, inverse_B, counts_U = torch.unique(labels_B, return_inverse=True, return_counts=True)
    normed = F.normalize(features_BCHW.detach().float(), dim=1)
    sums = normed.new_zeros(len(ids_U), *normed.shape[1:]).index_add_(0, inverse_B, normed)
    return Rows(ids_U, sums), counts_U


def exchange(world: World, rows: Rows, *, average: bool = False) -> Rows:
    """The sum (or the mean) over processes of rows by id; the same bits on every process.

    Args:
        world: the job.
        rows: what this process touched.
        average: divide each row by the number of processes that touched it.
    """
    if world.size == 1:
        return rows
    parts = zip(gather_rows(world, rows.ids), gather_rows(world, rows.values), strict=True)
    return add_up([Rows(*part) for part in parts], average=average)


def add_up(parts: list[Rows], *, average: bool = False) -> Rows:
    """The sum of rows by id, or their mean over the parts that have the id."""
    union = torch.unique(torch.cat([part.ids for part in parts]))
    total = parts[0].values.new_zeros(len(union), *parts[0].values.shape[1:])
    counts = total.new_zeros(len(union))
    # Part by part: ids are unique within one, so no sum depends on the order in which threads arrive.
    for part in parts:
        slots = torch.searchsorted(union, part.ids)
        total.index_add_(0, slots, part.values)
        counts.index_add_(0, slots, torch.ones_like(slots, dtype=counts.dtype))
    return Rows(union, total / counts.view(-1, 1, 1, 1) if average else total)


def sparse_rows(gradient: torch.Tensor) -> Rows:
    """The rows of a gradient that is sparse over dimension 0."""
    assert gradient.is_sparse, "the class table's gradient is a sparse tensor over dimension 0"
    ids = gradient._indices()[0]
    # PyTorch forgets, as it puts a gradient into `.grad`, that it is coalesced: doing it again is a copy.
    if not gradient.is_coalesced() and not bool((ids[1:] > ids[:-1]).all()):
        gradient = gradient.coalesce()
        ids = gradient.indices()[0]
    return Rows(ids, gradient._values())


def take(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """A copy of some rows; `table[ids]` takes up to five times as long (CPU, rows that no cache holds)."""
    return table.detach().index_select(0, ids)


def put(table: torch.Tensor, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """Replaces some rows; ids are unique."""
    table.index_copy_(0, ids, rows)


def no_rows(table: torch.Tensor) -> Rows:
    """None of a table's rows."""
    ids = torch.zeros(0, dtype=torch.int64, device=table.device)
    return Rows(ids, torch.zeros(0, *table.shape[1:], device=table.device))


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 values as what a table stores.

    To bfloat16 they are rounded up or down at random, with chances that keep the mean: rounded to the
    nearest, a row would stand still once its steps are smaller than half a place. The draw is a hash of the
    value's own bits, so that every process that computes a row rounds it alike.
    """
    if dtype == torch.float32:
        return values
    assert dtype == torch.bfloat16
    bits = values.contiguous().view(torch.int32).to(torch.int64)
    draw = (bits & 0xFFFFFFFF) * 0x9E3779B1 & 0xFFFFFFFF
    draw = (draw ^ draw >> 15) * 0x85EBCA6B >> 13 & 0xFFFF
    found = (bits + draw & ~0xFFFF).to(torch.int32).view(torch.float32)
    return torch.where(values.isfinite(), found, values).to(dtype)
