"""Which process keeps which class, and how rows travel between processes while these compute.

    asking = owners.ask(ids)         which rows everybody wants; can be asked long before the rows are final
    errand = asking.wait()
    coming = errand.fetch(take)      rows set out to whoever wants them ... the network computes ...
    rows   = coming.wait()
    going  = errand.send_home(...)   their gradients set out to whoever keeps them ... backward goes on ...
    parts  = going.wait()

Legend: R processes, C channels, H x W feature map, U touched classes (unique, ascending).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nearkin_trainer.classes.rows import Rows, add_up
from nearkin_trainer.distributed import World, as_bytes, gather_ids, swap_rows


@dataclass(frozen=True)
class Owners:
    """Which process keeps which class: contiguous shares, process r's beginning at `starts[r]`.

    Args:
        world: the job.
        num_classes: N.
        overlapped: rows travel while the caller goes on; otherwise it waits for them at once, for comparing.
    """

    world: World
    num_classes: int
    overlapped: bool = True

    @property
    def mine(self) -> slice:
        """The classes of this process."""
        return self.world.share(self.num_classes)

    def ask(self, ids: torch.Tensor, room: int | None = None) -> "Asking":
        """Begins to tell all processes which classes' rows this one wants to read.

        Args:
            ids: `[U]` ascending, on the CPU.
            room: at least U and the same number on all processes; by default they agree on one, which takes
                a journey more.
        """
        gathered, work = gather_ids(self.world, ids, room)
        asking = Asking(self, ids, gathered, work)
        if not self.overlapped:
            asking.wait()
        return asking

    def send_home(self, rows: Rows) -> Rows:
        """The sum over processes of the rows of this process's classes, numbered from 0.

        All processes call this together, each with the rows that it has touched, whosever they are. The sum
        is taken in the order of `exchange`, and has its bits.
        """
        sizes = self.edges(rows.ids).diff().tolist()
        ids = swap_rows(self.world, list(torch.split(rows.ids, sizes)))
        values = swap_rows(self.world, list(torch.split(rows.values, sizes)))
        parts = [Rows(i - self.mine.start, v) for i, v in zip(ids, values, strict=True)]
        return parts[0] if self.world.size == 1 else add_up(parts)

    def edges(self, ids: torch.Tensor) -> torch.Tensor:
        """Where in ascending ids each process's classes begin, and the last one's end; on the CPU."""
        starts = [self.world.share_of(rank, self.num_classes).start for rank in range(self.world.size)]
        return torch.searchsorted(ids, torch.tensor([*starts, self.num_classes], device=ids.device)).cpu()


@dataclass(frozen=True)
class Asking:
    """Processes telling each other what they want to read."""

    owners: Owners
    ids: torch.Tensor
    gathered: list[torch.Tensor]
    work: Any

    def wait(self) -> "Errand":
        """What everybody wants of whom."""
        if self.work is not None:
            self.work.wait()
        owners, device = self.owners, self.owners.world.device
        asked = []
        for ids in self.gathered:
            wanted = ids[ids >= 0]
            first, last = owners.edges(wanted)[owners.world.rank :][:2].tolist()
            asked.append((wanted[first:last] - owners.mine.start).to(device))
        counts = owners.edges(self.ids).diff().tolist()
        return Errand(owners, self.ids.to(device), asked, counts)


@dataclass(frozen=True)
class Replicas:
    """What the processes read in a step where each has the whole table: they tell each other its gradients.

    Args:
        world: the job.
        ids: this process's classes, ascending, on the CPU.
        gathered: those of all processes, -1 after the last; to be read when `work` has ended.
    """

    world: World
    ids: torch.Tensor
    gathered: list[torch.Tensor]
    work: Any

    @staticmethod
    def ask(world: World, ids: torch.Tensor, room: int) -> "Replicas":
        """Begins to tell all processes which classes this one reads; `room` as in `Owners.ask`."""
        return Replicas(world, ids, *gather_ids(world, ids, room))

    def send(self, gradient: Rows) -> "UnderWay":
        """Sends everybody the gradient of this process's classes; `sum_of` adds up what comes."""
        if not torch.equal(self.ids, gradient.ids.cpu()):
            raise ValueError("this step reads other classes than `expect` has announced")
        self.work.wait()
        longest = max(int((ids >= 0).sum()) for ids in self.gathered)
        values = gradient.values
        padded = values.new_empty(longest, *values.shape[1:])
        padded[: len(values)] = values
        received = values.new_empty(self.world.size, *padded.shape)
        return UnderWay(padded, received, dist.all_gather([*received], padded, async_op=True))

    def sum_of(self, arrived: torch.Tensor) -> Rows:
        """The sum by class of what has come; its bits are those of `exchange`."""
        parts = []
        for ids, values in zip(self.gathered, arrived, strict=True):
            present = ids[ids >= 0].to(values.device)
            parts.append(Rows(present, values[: len(present)]))
        return add_up(parts)


@dataclass(frozen=True)
class Errand:
    """Which rows travel in a step, there and back.

    Attributes:
        ids: `[U]` classes that this process reads, ascending.
        asked: for each process, which rows of this one it reads; positions in the share.
        counts: for each process, how many of its rows this one reads.
    """

    owners: Owners
    ids: torch.Tensor
    asked: list[torch.Tensor]
    counts: list[int]

    def fetch(self, take: Callable[[torch.Tensor], torch.Tensor]) -> "UnderWay":
        """Sends everybody the rows that they want; what comes are those that this process does.

        Args:
            take: the rows at some positions of this process's share, as they are now.
        """
        return self._send(take(torch.cat(self.asked)), self._lengths, self.counts)

    def send_home(self, values_U: torch.Tensor) -> "UnderWay":
        """Sends something for each row read to the process that keeps it; `sum_of` adds up what comes."""
        return self._send(values_U.contiguous(), self.counts, self._lengths)

    def sum_of(self, arrived: torch.Tensor, *, average: bool = False) -> Rows:
        """The sum (or mean) by position of what has come home; its bits are those of `exchange`."""
        values = torch.split(arrived, self._lengths)
        parts = [Rows(*part) for part in zip(self.asked, values, strict=True)]
        return parts[0] if self.owners.world.size == 1 else add_up(parts, average=average)

    @property
    def _lengths(self) -> list[int]:
        return [len(ids) for ids in self.asked]

    def _send(self, sent: torch.Tensor, leaving: list[int], coming: list[int]) -> "UnderWay":
        if self.owners.world.size == 1:
            return UnderWay(sent, sent, None)
        received = sent.new_empty(sum(coming), *sent.shape[1:])
        # As bytes, because not every backend knows every dtype.
        work = dist.all_to_all_single(as_bytes(received), as_bytes(sent), coming, leaving, async_op=True)
        under_way = UnderWay(sent, received, work)
        if not self.owners.overlapped:
            under_way.wait()
        return under_way


@dataclass(frozen=True)
class UnderWay:
    """Rows that are travelling. `sent` has to live until they have arrived."""

    sent: torch.Tensor
    received: torch.Tensor
    work: Any

    def wait(self) -> torch.Tensor:
        """What has come, in the order of processes."""
        if self.work is not None:
            self.work.wait()
        return self.received
