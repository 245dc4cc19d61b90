"""Class tables that are larger than the device: rows in host memory, those of recent steps on the device.

A row is brought to the device before the step that reads it, together with what its optimiser keeps for it,
and changes there. What has changed goes back to the host when the row has to make room for another (the one
that has rested longest goes first), and when the whole table is wanted. So a row that is read again soon does
not travel at all, and the host's processor never computes an update.

Nothing in a step costs anything per class of the table, nor per row of the cache.

Legend: N classes, R rows of the cache, n rows of a step.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nearkin_trainer.classes import mapped
from nearkin_trainer.classes.optimisers import RowOptimiser
from nearkin_trainer.classes.rows import Rows, put, take

STALE = 4  # notes of uses are tidied up when there are so many per row of the cache
BLOCK_BYTES = 64 * 2**20  # of rows on their way back at a time


@dataclass(frozen=True)
class Host:
    """Where the rows of a table lie when the device has no room for them.

    Args:
        cache_rows: R, how many rows the device keeps; a step that touches more of them takes turns.
        folder: tables are memory-mapped files here, for more rows than there is memory; they are removed when
            the process ends. By default they are in memory.
    """

    cache_rows: int
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.cache_rows < 1:
            raise ValueError(f"cache_rows={self.cache_rows} must be at least 1")

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A new table."""
        if self.folder is None or len(shape) == 1:  # one number per row needs no file
            return torch.empty(shape, dtype=dtype).zero_()  # written now, not page by page in the steps
        return mapped.zeros(self.folder, shape, dtype)


class RowCache:
    """Rows of some tables on the device.

    All tables have a row per class, and a row is brought, or goes back, in all of them at once.

    Args:
        host: where the tables lie.
        num_rows: of each table.
        device: where the cache is.
    """

    def __init__(self, host: Host, num_rows: int, device: torch.device) -> None:
        self.host, self.device = host, device
        self.size = min(host.cache_rows, num_rows)
        self.brought = 0
        """Rows brought to the device so far."""
        self.before_write: Callable[[torch.Tensor], None] | None = None
        """Called with the numbers of the rows that are about to change on the host."""
        self._tables: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._slots = torch.full((num_rows,), -1, dtype=torch.int32)  # of each row; -1: not here
        self._rows = torch.full((self.size,), -1)  # of each slot
        self._changed = torch.zeros(self.size, dtype=torch.bool)  # since it was brought; by slot
        self._used = torch.zeros(self.size, dtype=torch.int64)  # the turn of its last use; by slot
        self._uses: deque[tuple[int, torch.Tensor]] = deque()  # (turn, slots), oldest first
        self._noted = self._turn = self._filled = 0

    def add(self, table: torch.Tensor, cached: torch.Tensor) -> None:
        """One more table `[N, ...]` on the host, and where its rows go on the device, `[R, ...]`."""
        if self._filled:  # rows that are here would be without it
            self.flush()
            self.forget()
        assert len(cached) == self.size
        self._tables.append((table, cached))

    def bring(self, rows: torch.Tensor, *, change: bool = False) -> Iterator[tuple[slice, torch.Tensor]]:
        """Brings rows here, as many at a time as there is room for.

        Args:
            rows: their numbers, unique, int64.
            change: the caller is going to change them.

        Yields:
            Which of `rows`, and the slots where they lie until the next turn; on the device.
        """
        rows = rows.cpu()
        for start in range(0, len(rows), self.size):
            part = slice(start, min(start + self.size, len(rows)))
            slots = self._bring(rows[part])
            if change:
                self._changed[slots] = True
            yield part, slots.to(self.device)

    def flush(self) -> None:
        """Writes what has changed back to the host. The rows stay here."""
        changed = torch.nonzero(self._changed[: self._filled]).flatten()
        widest = max(cached[0].numel() * cached.element_size() for _, cached in self._tables)
        for slots in torch.split(changed, max(1, BLOCK_BYTES // widest)):
            self._write_back(slots)

    def forget(self) -> None:
        """Drops all rows: the tables on the host have been given other ones."""
        self._slots[self._rows[: self._filled]] = -1
        self._changed.zero_()
        self._uses.clear()
        self._noted = self._filled = 0

    def _bring(self, rows: torch.Tensor) -> torch.Tensor:
        self._turn += 1
        slots = self._slots[rows].long()
        self._used[slots[slots >= 0]] = self._turn  # so that they do not make room for the others
        missing = rows[slots < 0]
        if len(missing):
            room = self._make_room(len(missing))
            self._slots[missing], self._rows[room] = room.int(), missing
            self._used[room] = self._turn
            assert torch.equal(self._slots[missing], room.int()), "a row was asked for twice"
            places = room.to(self.device)
            for table, _ in self._tables:
                mapped.fetch(table, missing)
            for table, cached in self._tables:
                put(cached, places, take(table, missing).to(self.device))
            self.brought += len(missing)
            slots = self._slots[rows].long()
        self._note(slots)
        return slots

    def _note(self, slots: torch.Tensor) -> None:
        self._uses.append((self._turn, slots))
        self._noted += len(slots)
        if self._noted > STALE * self.size:
            fresh = [(turn, slots[self._used[slots] == turn]) for turn, slots in self._uses]
            self._uses = deque((turn, slots) for turn, slots in fresh if len(slots))
            self._noted = sum(len(slots) for _, slots in self._uses)

    def _make_room(self, count: int) -> torch.Tensor:
        """Slots for so many rows: free ones, then those of the rows that have rested longest."""
        unused = torch.arange(self._filled, min(self.size, self._filled + count))
        self._filled += len(unused)
        found, wanted = [unused], count - len(unused)
        while wanted:
            turn, slots = self._uses.popleft()
            self._noted -= len(slots)
            resting = slots[self._used[slots] == turn]  # the others have been used again since
            if len(resting) > wanted:
                self._uses.appendleft((turn, resting[wanted:]))
                self._noted += len(resting) - wanted
                resting = resting[:wanted]
            found.append(resting)
            wanted -= len(resting)
        self._leave(torch.cat(found[1:]) if found[1:] else unused[:0])
        return torch.cat(found)

    def _leave(self, slots: torch.Tensor) -> None:
        self._write_back(slots[self._changed[slots]])
        self._slots[self._rows[slots]] = -1

    def _write_back(self, slots: torch.Tensor) -> None:
        if not len(slots):
            return
        rows, places = self._rows[slots], slots.to(self.device)
        if self.before_write is not None:
            self.before_write(rows)
        for table, cached in self._tables:
            mapped.put(table.detach(), rows, take(cached, places).cpu())
        self._changed[slots] = False


class CachedRowOptimiser(RowOptimiser):
    """A row-wise optimiser of rows in a cache; its buffers are the whole state, on the host.

    Args:
        optimiser: of the cached rows.
        cache: theirs.
    """

    def __init__(self, optimiser: RowOptimiser, cache: RowCache, num_rows: int) -> None:
        super().__init__()
        self._optimiser, self.cache = [optimiser], cache  # in a list: no submodule, its state is ours
        for name, cached in [*optimiser.named_buffers()]:
            table = cache.host.zeros(num_rows, *cached.shape[1:], dtype=cached.dtype)
            self.register_buffer(name, table)
            cache.add(table, cached)
        flush_and_forget(self)

    @torch.no_grad()
    def update(self, table: torch.Tensor, gradient: Rows, rate: float) -> None:
        """Moves rows; `table` are those in the cache, ids are their numbers in the whole table."""
        for part, slots in self.cache.bring(gradient.ids, change=True):
            self._optimiser[0].update(table, Rows(slots, gradient.values[part]), rate)


def flush_and_forget(module: nn.Module) -> None:
    """Makes a module's state whole before it is read, and drops what is cached when it is given another.

    Its cache is the attribute `cache`: that of the module that is asked, which may be a copy of this one.
    """
    module.register_state_dict_pre_hook(_flush)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]


def _flush(module: nn.Module, *_: object) -> None:
    cache = module.cache
    assert isinstance(cache, RowCache)
    cache.flush()


def _forget(module: nn.Module, *_: object) -> None:
    cache = module.cache
    assert isinstance(cache, RowCache)
    cache.forget()
