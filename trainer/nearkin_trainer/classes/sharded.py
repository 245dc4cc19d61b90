"""The class-embedding table where each process keeps its share: rows travel to where a step reads them.

Legend: N classes, C channels, H x W feature map, U touched classes (unique, ascending), B images.
"""

from collections.abc import Iterable, Iterator

import torch

from nearkin_trainer.classes.host import Host
from nearkin_trainer.classes.owners import Asking, Errand, Owners, UnderWay
from nearkin_trainer.classes.rows import Rows, class_sums, no_rows, sparse_rows
from nearkin_trainer.classes.table import ClassEmbeddings, Keeping, Read, classes_of
from nearkin_trainer.distributed import World, sum_over_ranks


class ShardedClassEmbeddings(ClassEmbeddings):
    """The table, each process keeping its contiguous share of the rows (`World.share`).

    A step ends with the bits that a replicated table would have. What a step calls is an exchange: all
    processes call it together.

    Rows travel from `set_out` to `read`, their gradients from the moment that the backward pass has them to
    `take_gradient`, and means of features from `send_means` to `take_means`; whatever is computed in between
    hides it. A row that was read counts as touched, also
    where its gradient is zero.
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
        *,
        host: Host | None = None,
        overlapped: bool = True,
    ) -> None:
        if num_classes < world.size:
            raise ValueError(
                f"embedding.sharded: {num_classes} classes cannot be shared among {world.size} processes; "
                "leave it out"
            )
        self._owners = Owners(world, num_classes, overlapped)
        super().__init__(num_classes, channels, height, width, keeping, dtype, host=host, device=world.device)
        self._asking: Asking | None = None
        self._coming: tuple[Errand, UnderWay] | None = None
        self._asking_home: Asking | None = None
        self._going_home: tuple[Errand, UnderWay] | None = None

    @property
    def kept(self) -> slice:
        """The classes of this process."""
        return self._owners.mine

    def expect(self, labels: torch.Tensor, neighbours: torch.Tensor) -> None:
        """See `ClassEmbeddings.expect`: tells the other processes which rows this one is going to read."""
        assert self._asking is None
        self._asking = self._owners.ask(*classes_of(labels, neighbours))

    def set_out(self) -> None:
        """See `ClassEmbeddings.set_out`: sends the others the rows that they expect."""
        if self._asking is not None:
            assert self._coming is None
            errand, self._asking = self._asking.wait(), None
            self._coming = errand, errand.fetch(self._take)

    def send_gradient(self) -> None:
        """Sends the gradients home, unless they have left already."""
        if len(self._reads) == 1 and self._going is None:
            self._send(self._reads[0])

    def take_gradient(self, world: World) -> Rows | None:
        """The mean over processes of the gradient of this process's rows."""
        self.send_gradient()
        if self._going is None:  # nothing was read, or several times
            return super().take_gradient(world)
        (read,), going = self._reads, self._going
        self._reads, self._going = [], None
        assert read.errand is not None
        rows = read.errand.sum_of(going.wait())
        return rows.over(world.size) if len(rows.ids) else None

    def collect(self, world: World, rows: Rows) -> Rows:
        """The sum over processes of the rows of this process's classes."""
        assert world.size == self._owners.world.size
        return self._owners.send_home(rows)

    def expect_means(self, labels: torch.Tensor) -> None:
        """See `ClassEmbeddings.expect_means`: tells the other processes which classes' means will come."""
        self._asking_home = self._owners.ask(torch.unique(labels.cpu()), room=len(labels))

    def send_means(self, means: Rows) -> None:
        """Sends each mean to the process that keeps its class."""
        asking, self._asking_home = self._asking_home or self._owners.ask(means.ids.cpu()), None
        errand = asking.wait()
        if not torch.equal(errand.ids, means.ids):
            raise ValueError("these means are of other classes than `expect_means` has announced")
        self._going_home = errand, errand.send_home(means.values)

    def take_means(self, world: World) -> Rows:
        """The mean over processes, of this process's classes."""
        assert self._going_home is not None
        (errand, going), self._going_home = self._going_home, None
        return errand.sum_of(going.wait(), average=True)

    @property
    def _read_in_place(self) -> bool:
        return False

    def _fetch(self, ids: torch.Tensor) -> tuple[torch.Tensor, Errand | None]:
        if self._coming is None:
            if self._asking is None:
                self._asking = self._owners.ask(ids.cpu())
            self.set_out()
        assert self._coming is not None
        (errand, rows), self._coming = self._coming, None
        if not torch.equal(errand.ids, ids):
            raise ValueError("this step reads other classes than `expect` has announced")
        return rows.wait(), errand

    def _gradient_is_there(self, values: torch.Tensor) -> None:
        if len(self._reads) == 1:
            if self._going is not None:  # a second backward pass has added to it
                self._going.wait()
            self._send(self._reads[0])

    def _send(self, read: Read) -> None:
        assert read.errand is not None
        found = no_rows(read.values) if read.values.grad is None else sparse_rows(read.values.grad)
        values = found.values
        if len(found.ids) < len(read.ids):
            values = torch.zeros_like(read.values).index_copy_(0, found.ids, values)
        self._going = read.errand.send_home(values)

    def _feature_sums(
        self, world: World, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[tuple[Rows, torch.Tensor]]:
        for features, labels in _in_step(world, batches, self._table):
            mine, images = class_sums(features, labels)
            rows = self._owners.send_home(mine)
            counts = images.to(rows.values.dtype).view(-1, 1, 1, 1)
            yield rows, self._owners.send_home(Rows(mine.ids, counts)).values.flatten()

    def _sum(self, world: World, values: torch.Tensor) -> None:
        """Nothing: the sums of this process's classes are those of all processes."""


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
