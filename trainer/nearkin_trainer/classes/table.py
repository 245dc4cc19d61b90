"""The class-embedding table: where its rows lie, how a step reads them and how changes reach them.

Rows are kept in one of two ways:

    learnable   they follow their gradient; a row-wise optimiser touches only the rows that a step has read
    memory      they follow the features of their class's images; no gradient

and lie in one of two places:

    ClassEmbeddings          all of them on every process; processes exchange (ids, rows) of what they touched
                             and apply the same update in the same order, so that the replicas stay identical
                             without ever being compared
    ShardedClassEmbeddings   each process keeps a contiguous share; the rows that a step reads travel to the
                             process that reads them while the network computes, and changes travel back

each on the device, or in host memory with the rows of recent steps on the device (host.py). Whichever way,
nothing in a step costs O(num_classes), and a step ends with the same bits.

Legend: N classes, C channels, H x W feature map, U touched classes (unique, ascending), B images.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import nn

from nearkin_trainer.classes import mapped
from nearkin_trainer.classes.host import CachedRowOptimiser, Host, RowCache, flush_and_forget
from nearkin_trainer.classes.optimisers import ROW_OPTIMISERS, RowOptimiser, RowOptimiserName
from nearkin_trainer.classes.owners import Errand, Replicas, UnderWay
from nearkin_trainer.classes.rows import (
    Rows,
    add_up,
    class_sums,
    exchange,
    no_rows,
    put,
    rounded,
    sparse_rows,
    take,
)
from nearkin_trainer.classes.snapshot import Snapshot
from nearkin_trainer.distributed import World, sum_over_ranks
from nearkin_trainer.matching.rows import check_range, touched_classes

Keeping = Literal["learnable", "memory"]

NOISE_BLOCK = 1024  # rows drawn from one generator
SMALL_ROW_BYTES = 4096  # so small, rows far apart are copied together faster than matched one by one (CPU)
SUM_BLOCK_BYTES = 64 * 2**20  # of rows summed over processes at a time


class ClassEmbeddings(nn.Module):
    """The table, whole on every process.

    Args:
        num_classes, channels, height, width: its shape.
        keeping: `learnable` or `memory`.
        dtype: what rows are stored as, float32 or bfloat16. They are matched, and changed, in float32.
        host: keeps the rows in host memory, and on the device only those of recent steps.
        device: where steps compute. Without `host` the table is made on the CPU and moved like any module.

    Attributes:
        weight: `[N, C, H, W]`; normal noise until `start_from` or the first steps fill it. With `host`, rows
            changed of late are in the cache: `rows` and `state_dict` bring them home first.
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
        *,
        host: Host | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes}: at least 2 classes are needed to tell them apart")
        self.keeping = keeping
        self.shape = (num_classes, channels, height, width)
        kept = self.kept
        size = kept.stop - kept.start
        self._reads: list[Read] = []
        self._world: World | None = None
        self._expected: list[Replicas] = []  # of this step, and of the one after it
        self._going: UnderWay | None = None
        self._means: Rows | None = None
        self._snapshot: Snapshot | None = None
        shape = (size, *self.shape[1:])
        table = torch.zeros(shape, dtype=dtype) if host is None else host.zeros(*shape, dtype=dtype)
        draw_noise(table, kept, num_classes)
        self.weight = nn.Parameter(table, requires_grad=keeping == "learnable")
        if keeping == "learnable":  # where it is read in place, its gradient comes here
            self.weight.register_post_accumulate_grad_hook(self._gradient_is_there)  # type: ignore[no-untyped-call]
        self.register_buffer("seen", torch.full((size,), keeping == "learnable"))
        self.cache: RowCache | None = None
        if host is not None:
            self.cache = RowCache(host, size, device or torch.device("cpu"))
            self._cached = torch.zeros(self.cache.size, *shape[1:], dtype=dtype, device=self.cache.device)
            self.cache.add(self.weight, self._cached)  # itself: a copy of both shares it as they do
            self.cache.before_write = self._before_change
            flush_and_forget(self)

    @property
    def num_classes(self) -> int:
        """N."""
        return self.shape[0]

    @property
    def kept(self) -> slice:
        """The classes whose rows `weight` and `seen` hold."""
        return slice(0, self.num_classes)

    # ----------------------------------------------------------------------------------------- a step

    def join(self, world: World) -> None:
        """Makes `expect` tell these processes what this one reads, so that gradients can travel early."""
        self._world = world if world.size > 1 else None

    def expect(self, labels: torch.Tensor, neighbours: torch.Tensor) -> None:
        """Says which classes the next `read` will be of: those of `labels` and `neighbours` (-1: none).

        Only a help; of several processes all call this together, or none does, with as many labels and
        neighbours on each.
        """
        if self._world is not None and self.weight.requires_grad:
            ids, room = classes_of(labels, neighbours)
            self._expected.append(Replicas.ask(self._world, ids, room))

    def set_out(self) -> None:
        """Says that the rows of the expected `read` are final: they may set out for where it will be."""

    def read(self, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A tensor of float32 rows, and where in it each of the `candidates` lies; −1 stays −1."""
        if self._read_in_place:
            return self.weight, candidates
        check_range(candidates, self.num_classes)
        touched = touched_classes(candidates)
        rows, errand = self._fetch(touched.ids)
        values = rows.float()
        if self.weight.requires_grad and torch.is_grad_enabled():
            values.requires_grad_()
            self._reads.append(Read(touched.ids, values, errand))
            values.register_post_accumulate_grad_hook(self._gradient_is_there)  # type: ignore[no-untyped-call]
        return values, touched.slots

    def send_gradient(self) -> None:
        """Says that there will be no more gradients in this step; all processes call this together."""
        if self._expected and self._going is None:
            self._going = self._expected[0].send(self._gradient_so_far())

    def take_gradient(self, world: World) -> Rows | None:
        """The mean over processes of the gradient rows of the step just done, and forgets them."""
        own = self._own_gradient()
        if self._going is None:
            rows = self.collect(world, own)
        else:
            going, self._going = self._going, None
            rows = self._expected.pop(0).sum_of(going.wait())
        return rows.over(world.size) if len(rows.ids) else None

    def optimiser(self, name: RowOptimiserName) -> RowOptimiser:
        """A new row-wise optimiser of this table; its state lies where the rows do."""
        if self.cache is None:
            return ROW_OPTIMISERS[name](self.weight)
        return CachedRowOptimiser(ROW_OPTIMISERS[name](self._cached), self.cache, len(self.weight))

    def update(self, optimiser: RowOptimiser, gradient: Rows, rate: float) -> None:
        """Moves rows against a gradient that `take_gradient` has given, by an optimiser of this table."""
        if self.cache is None:
            self._before_change(gradient.ids)
        optimiser.update(self._table, gradient, rate)

    def collect(self, world: World, rows: Rows) -> Rows:
        """The sum over processes of rows by class; ids are positions in `weight`.

        All processes call this together.
        """
        return exchange(world, rows)

    def expect_means(self, labels: torch.Tensor) -> None:
        """Says which classes the next `send_means` will be of: `labels`, as many on each process."""

    def send_means(self, means: Rows) -> None:
        """Hands over what this process's batch says about some classes: the means of their features."""
        self._means = means

    def take_means(self, world: World) -> Rows:
        """What `remember` needs: the mean over the processes that have sent one, for each class."""
        means, self._means = self._means, None
        assert means is not None
        return exchange(world, means, average=True)

    @torch.no_grad()
    def remember(self, rows: Rows, momentum: float) -> None:
        """Moves rows to `momentum * old + (1 - momentum) * new`; a row never seen before, to new.

        Args:
            rows: what `take_means` has put together; ids are positions in `weight`.
            momentum: share of the old row that stays.
        """
        ids = rows.ids.to(self.seen.device)
        keep = torch.where(self.seen[ids], momentum, 0.0).view(-1, 1, 1, 1).to(rows.values.device)
        table = self._table
        if self.cache is None:
            self._before_change(rows.ids)
        for part, places in self._open(rows.ids, change=True):
            moved = keep[part] * take(table, places).float() + (1 - keep[part]) * rows.values[part]
            put(table, places, rounded(moved, table.dtype))
        self.seen[ids] = True

    # ------------------------------------------------------------------------------------- the whole

    @torch.no_grad()
    def start_from(self, world: World, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Sets each row to the mean feature of its class.

        Args:
            world: the job; the processes' batches are put together.
            batches: `(features [B, C, H, W], labels int64 [B])` of this process. Classes without any keep
                their row.
        """
        if self.cache is not None:
            self.cache.flush()
            self.cache.forget()
        table, place = self.weight.detach(), self.weight.device
        # A float32 table is its own sum: there may be no room for a second one.
        sums = table if table.dtype == torch.float32 else self._zeros(*table.shape)
        counts = torch.zeros(len(table), device=place)
        for rows, images in self._feature_sums(world, batches):
            ids = rows.ids.to(place)
            mapped.fetch(sums, ids)
            found = take(sums, ids)
            found[counts[ids] == 0] = 0
            mapped.put(sums, ids, found.add_(rows.values.to(place)))
            counts.index_add_(0, ids, images.to(place, counts.dtype))
        self._put_together(world, sums, counts)

    def rows(self, classes: slice) -> torch.Tensor:
        """The rows of some of the classes kept here, without a copy."""
        if self.cache is not None:
            self.cache.flush()
        return self.weight.detach()[self._place(classes)]

    def snapshot(self, classes: slice) -> Snapshot:
        """The rows of some of the classes kept here as they are now, whatever steps do to them then.

        Only the last one made is kept up; close it when it has been read.
        """
        rows = self.rows(classes)
        self._snapshot = Snapshot(rows, self._place(classes).start)
        return self._snapshot

    def absent(self, classes: slice) -> torch.Tensor:
        """Those of some of the classes kept here that have no embedding yet; ids, int64."""
        ids: torch.Tensor = torch.nonzero(~self.seen[self._place(classes)]).flatten() + classes.start
        return ids

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what a step or a push has under way stays with this table, and so do the processes."""
        nothing: dict[str, Any] = {"_world": None, "_going": None, "_means": None, "_snapshot": None}
        return {**self.__dict__, **nothing, "_expected": [], "_reads": []}

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """A table in host memory stays there whatever device the model is moved to."""
        return self if self.cache is not None else super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

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
        if self.weight.dtype != torch.float32 or self.cache is not None:
            return False
        row_bytes = math.prod(self.shape[1:]) * self.weight.element_size()
        return self.weight.device.type != "cpu" or row_bytes > SMALL_ROW_BYTES

    @property
    def _table(self) -> torch.Tensor:
        """What steps read and change: the table, or the rows of it that are on the device."""
        return self.weight.detach() if self.cache is None else self._cached

    def _open(self, ids: torch.Tensor, *, change: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """Which of some rows (positions in `weight`) are to be had now, and where in `_table`."""
        if self.cache is not None:
            return self.cache.bring(ids, change=change)
        return iter([(slice(None), ids)])

    def _before_change(self, ids: torch.Tensor) -> None:
        """Called before rows of `weight` change in a step."""
        if self._snapshot is not None:
            self._snapshot.keep(ids)

    def _take(self, ids: torch.Tensor) -> torch.Tensor:
        """A copy of some rows, as they are stored. Ids may come twice: several processes may want a row."""
        table = self._table
        if self.cache is None:
            return take(table, ids)
        different, which = torch.unique(ids, return_inverse=True)
        found = table.new_empty(len(ids), *table.shape[1:])
        for part, places in self._open(different):
            here = torch.nonzero((which >= part.start) & (which < part.stop)).flatten()
            put(found, here, take(table, places[which[here] - part.start]))
        return found

    def _fetch(self, ids: torch.Tensor) -> "tuple[torch.Tensor, Errand | None]":
        """The rows of some classes, as they are stored; and the errand that brought them from elsewhere."""
        return self._take(ids), None

    def _gradient_is_there(self, values: torch.Tensor) -> None:
        """Called in the backward pass, as soon as the rows of a `read` have their gradient."""
        if self._expected:
            if self._going is not None:  # another read, or another backward pass, has added to it
                self._going.wait()
            self._going = self._expected[0].send(self._gradient_so_far())

    def _own_gradient(self) -> Rows:
        rows = self._gradient_so_far()
        self._reads, self.weight.grad = [], None
        return rows

    def _gradient_so_far(self) -> Rows:
        found = [(r.ids, sparse_rows(r.values.grad)) for r in self._reads if r.values.grad is not None]
        parts = [Rows(ids[rows.ids], rows.values) for ids, rows in found]
        if self.weight.grad is not None:
            parts.append(sparse_rows(self.weight.grad))
        if len(parts) < 2:
            return parts[0] if parts else no_rows(self._table)
        return add_up(parts)

    def _zeros(self, *shape: int) -> torch.Tensor:
        if self.cache is None:
            return torch.zeros(shape, device=self.weight.device)
        return self.cache.host.zeros(*shape)

    def _feature_sums(
        self, world: World, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[tuple[Rows, torch.Tensor]]:
        """Sums of features by class, ids being positions in `weight`; and of how many images each."""
        for features, labels in batches:
            yield class_sums(features, labels)

    def _put_together(self, world: World, sums: torch.Tensor, counts: torch.Tensor) -> None:
        """Makes the sums of all processes the rows' means. `sums` may be the table itself."""
        step = max(1, SUM_BLOCK_BYTES // (4 * sums[0].numel()))
        for first in range(0, len(sums), step):
            block = slice(first, first + step)
            mine = (counts[block] > 0).view(-1, 1, 1, 1)
            total = torch.where(mine, sums[block], 0.0).to(world.device)
            images = counts[block].to(world.device)
            self._sum(world, total)
            self._sum(world, images)
            met = (images > 0).to(self.weight.device)
            means = (total / images.view(-1, 1, 1, 1)).to(self.weight)
            found = torch.where(met.view(-1, 1, 1, 1), means, self.weight[block])
            mapped.put_block(self.weight.detach(), first, found)
            self.seen[block] |= met

    def _sum(self, world: World, values: torch.Tensor) -> None:
        sum_over_ranks(world, values)


@dataclass(frozen=True)
class Read:
    """Rows that a step has fetched: their classes, and the leaf that collects their gradient."""

    ids: torch.Tensor
    values: torch.Tensor
    errand: Errand | None


def classes_of(labels: torch.Tensor, neighbours: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The different ids among both, ascending, on the CPU; and how many there can be at most."""
    ids = torch.cat([labels.flatten().cpu(), neighbours.flatten().cpu().to(torch.int64)])
    return torch.unique(ids[ids >= 0]), len(ids)


def draw_noise(table: torch.Tensor, rows: slice, num_rows: int) -> None:
    """Fills `table` with some rows of one of normal noise; a row's does not depend on how many are drawn.

    Takes one number from torch's generator, the same on all processes that have been seeded alike.
    """
    seed = int(torch.randint(2**62, ()))
    for start in range(rows.start - rows.start % NOISE_BLOCK, rows.stop, NOISE_BLOCK):
        generator = torch.Generator().manual_seed(seed ^ start)
        block = torch.randn(min(NOISE_BLOCK, num_rows - start), *table.shape[1:], generator=generator)
        first, last = max(start, rows.start), min(start + len(block), rows.stop)
        drawn = block[first - start : last - start].div_(table.shape[1] ** 0.5)
        mapped.put_block(table, first - rows.start, drawn.to(table.dtype))
