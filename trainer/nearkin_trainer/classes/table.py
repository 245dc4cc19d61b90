"""The class-embedding table: where its rows lie, how a step reads them and how changes reach them.

Rows are kept in one of two ways:

    learnable   they follow their gradient; a row-wise optimiser touches only the rows that a step has read
    memory      they follow the features of their class's images; no gradient

and lie in one of two places:

    ClassEmbeddings          all of them on every process; processes exchange (ids, rows) of what they touched
                             and apply the same update in the same order, so that the replicas stay identical
                             without ever being compared
    ShardedClassEmbeddings   each process keeps a contiguous share; the rows that a step reads travel to the
                             process that reads them, and changes travel back

Either way, nothing in a step costs O(num_classes).

Legend: N classes, C channels, H x W feature map, U touched classes (unique, ascending), B images.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from nearkin_trainer.classes.rows import (
    Owners,
    Rows,
    add_up,
    class_sums,
    exchange,
    no_rows,
    rounded,
    sparse_rows,
)
from nearkin_trainer.distributed import World, sum_over_ranks
from nearkin_trainer.matching.rows import touched_classes

Keeping = Literal["learnable", "memory"]

NOISE_BLOCK = 1024  # rows drawn from one generator


class ClassEmbeddings(nn.Module):
    """The table, whole on every process.

    Args:
        num_classes, channels, height, width: its shape.
        keeping: `learnable` or `memory`.
        dtype: what rows are stored as, float32 or bfloat16. They are matched, and changed, in float32.

    Attributes:
        weight: `[N, C, H, W]`; normal noise until `start_from` or the first steps fill it.
        seen: bool `[N]`; whether the row means anything yet. Rows never seen are absent from the neighbour
            table.
        shape: of the whole table, `(N, C, H, W)`.
    """

    weight: nn.Parameter
    seen: torch.Tensor

    def __init__(  # noqa: PLR0917
        self,
        num_classes: int,
        channels: int,
        height: int,
        width: int,
        keeping: Keeping = "learnable",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: at least 2 classes are needed to tell them apart")
        self.keeping = keeping
        self.shape = (num_classes, channels, height, width)
        kept = self.kept
        self._reads: list[_Read] = []
        self.weight = nn.Parameter(noise(self.shape, kept).to(dtype), requires_grad=keeping == "learnable")
        self.register_buffer("seen", torch.full((kept.stop - kept.start,), keeping == "learnable"))

    @property
    def num_classes(self) -> int:
        """N."""
        return self.shape[0]

    @property
    def kept(self) -> slice:
        """The classes whose rows `weight` and `seen` hold."""
        return slice(0, self.num_classes)

    def read(self, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A tensor of float32 rows, and where in it each of the `candidates` lies; −1 stays −1."""
        if self._read_in_place:
            return self.weight, candidates
        touched = touched_classes(candidates)
        values = self._fetch(touched.ids).float()
        if self.weight.requires_grad and torch.is_grad_enabled():
            values.requires_grad_()
            self._reads.append(_Read(touched.ids, values))
        return values, touched.slots

    def collect(self, world: World, rows: Rows, *, average: bool = False) -> Rows:
        """The sum (or the mean) over processes of rows by class; ids are positions in `weight`.

        All processes call this together.
        """
        return exchange(world, rows, average=average)

    def take_gradient(self, world: World) -> Rows | None:
        """The mean over processes of the gradient rows of the step just done, and forgets them."""
        rows = self.collect(world, self._own_gradient())
        return Rows(rows.ids, rows.values / world.size) if len(rows.ids) else None

    @torch.no_grad()
    def start_from(self, world: World, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Sets each row to the mean feature of its class.

        Args:
            world: the job; the processes' batches are put together.
            batches: `(features [B, C, H, W], labels int64 [B])` of this process. Classes without any keep
                their row.
        """
        sums = torch.zeros_like(self.weight, dtype=torch.float32)
        counts = torch.zeros(len(self.weight), device=self.weight.device)
        self._add_features(world, batches, sums, counts)
        met = counts > 0
        self.weight[met] = (sums[met] / counts[met].view(-1, 1, 1, 1)).to(self.weight.dtype)
        self.seen |= met

    @torch.no_grad()
    def remember(self, rows: Rows, momentum: float) -> None:
        """Moves rows to `momentum * old + (1 - momentum) * new`; a row never seen before, to new.

        Args:
            rows: what `collect` has put together.
            momentum: share of the old row that stays.
        """
        old = self.weight[rows.ids].float()
        keep = torch.where(self.seen[rows.ids], momentum, 0.0).view(-1, 1, 1, 1)
        self.weight[rows.ids] = rounded(keep * old + (1 - keep) * rows.values, self.weight.dtype)
        self.seen[rows.ids] = True

    def rows(self, classes: slice) -> torch.Tensor:
        """The rows of some of the classes kept here, without a copy."""
        return self.weight.detach()[self._place(classes)]

    def absent(self, classes: slice) -> torch.Tensor:
        """Those of some of the classes kept here that have no embedding yet; ids, int64."""
        ids: torch.Tensor = torch.nonzero(~self.seen[self._place(classes)]).flatten() + classes.start
        return ids

    def _place(self, classes: slice) -> slice:
        kept = self.kept
        if not kept.start <= classes.start <= classes.stop <= kept.stop:
            raise ValueError(
                f"classes {classes.start} to {classes.stop} are not all kept by this process, "
                f"which keeps {kept.start} to {kept.stop}"
            )
        return slice(classes.start - kept.start, classes.stop - kept.start)

    @property
    def _read_in_place(self) -> bool:
        return self.weight.dtype == torch.float32

    def _fetch(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight.detach()[ids]

    def _own_gradient(self) -> Rows:
        reads, self._reads = self._reads, []
        found = [(read.ids, sparse_rows(read.values.grad)) for read in reads if read.values.grad is not None]
        parts = [Rows(ids[rows.ids], rows.values) for ids, rows in found]
        if self.weight.grad is not None:
            parts.append(sparse_rows(self.weight.grad))
            self.weight.grad = None
        if len(parts) < 2:
            return parts[0] if parts else no_rows(self.weight)
        return add_up(parts)

    def _add_features(
        self,
        world: World,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        sums: torch.Tensor,
        counts: torch.Tensor,
    ) -> None:
        for features, labels in batches:
            sums.index_add_(0, labels, F.normalize(features.float(), dim=1))
            counts.index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
        sum_over_ranks(world, sums)
        sum_over_ranks(world, counts)


@dataclass(frozen=True)
class _Read:
    """Rows that a step has fetched: their classes, and the leaf that collects their gradient."""

    ids: torch.Tensor
    values: torch.Tensor


class ShardedClassEmbeddings(ClassEmbeddings):
    """The table, each process keeping its contiguous share of the rows (`World.share`).

    A step ends with the bits that a replicated table would have. `read` and `collect` are exchanges: all
    processes call them together.
    """

    def __init__(  # noqa: PLR0917
        self,
        world: World,
        num_classes: int,
        channels: int,
        height: int,
        width: int,
        keeping: Keeping = "learnable",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_classes < world.size:
            raise ValueError(
                f"embedding.sharded: {num_classes} classes cannot be shared among {world.size} processes; "
                "leave it out"
            )
        self._owners = Owners(world, num_classes)
        super().__init__(num_classes, channels, height, width, keeping, dtype)

    @property
    def kept(self) -> slice:
        """The classes of this process."""
        return self._owners.mine

    def collect(self, world: World, rows: Rows, *, average: bool = False) -> Rows:
        """The sum (or the mean) over processes of the rows of this process's classes."""
        assert world.size == self._owners.world.size
        return self._owners.send_home(rows, average=average)

    @property
    def _read_in_place(self) -> bool:
        return False

    def _fetch(self, ids: torch.Tensor) -> torch.Tensor:
        return self._owners.fetch(ids, self.weight.detach())

    def _add_features(
        self,
        world: World,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        sums: torch.Tensor,
        counts: torch.Tensor,
    ) -> None:
        for features, labels in _in_step(world, batches, self.weight):
            mine, images = class_sums(features, labels)
            rows = self._owners.send_home(mine)
            sums.index_add_(0, rows.ids, rows.values)
            met = self._owners.send_home(Rows(mine.ids, images.to(counts.dtype)))
            counts.index_add_(0, met.ids, met.values)


def _in_step(
    world: World, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], like: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches, followed by empty ones until every process has come to its end."""
    remaining = iter(batches)
    nothing = (like.new_zeros(0, *like.shape[1:]), torch.zeros(0, dtype=torch.int64, device=like.device))
    while True:
        batch = next(remaining, None)
        going = torch.tensor(float(batch is not None), device=world.device)
        if not sum_over_ranks(world, going):
            return
        yield nothing if batch is None else batch


def noise(shape: tuple[int, ...], rows: slice) -> torch.Tensor:
    """Some rows of a table of normal noise; a row's does not depend on how many are drawn.

    Takes one number from torch's generator, the same on all processes that have been seeded alike.
    """
    seed = int(torch.randint(2**62, ()))
    found = torch.empty(rows.stop - rows.start, *shape[1:])
    for start in range(rows.start - rows.start % NOISE_BLOCK, rows.stop, NOISE_BLOCK):
        generator = torch.Generator().manual_seed(seed ^ start)
        block = torch.randn(min(NOISE_BLOCK, shape[0] - start), *shape[1:], generator=generator)
        first, last = max(start, rows.start), min(start + len(block), rows.stop)
        found[first - rows.start : last - rows.start] = block[first - start : last - start]
    return found.div_(shape[1] ** 0.5)
