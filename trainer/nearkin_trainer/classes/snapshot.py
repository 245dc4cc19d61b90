"""The rows of a table as they were, while training goes on changing it, without a copy of all of them.

A row is put aside only when it is about to change before it has been read. Rows are read in blocks, first to
last, so that memory holds one block and the rows that were overtaken.
"""

import threading
from collections.abc import Iterator

import torch

from nearkin_trainer.classes import mapped
from nearkin_trainer.classes.rows import take

PIECE_BYTES = 8 * 2**20  # copied while nobody may change rows


class Snapshot:
    """Some rows of a table as they are when this is made. `keep` and `blocks` may run on two threads.

    Args:
        table: the rows, on any device; whoever changes them calls `keep` before.
        first: position of the first of them in what `keep` is told.
    """

    def __init__(self, table: torch.Tensor, first: int = 0) -> None:
        self._table, self._first = table, first
        self._lock = threading.Lock()
        self._aside: list[torch.Tensor] = []  # rows put aside, a part for each time that rows changed
        self._part = torch.full((len(table),), -1, dtype=torch.int32)  # of each row, where it is put aside
        self._place = torch.zeros(len(table), dtype=torch.int32)  # in that part
        self._read = 0  # rows read so far; those before it may change freely

    @property
    def rows_aside(self) -> int:
        """How many rows are put aside."""
        with self._lock:
            return sum(len(part) for part in self._aside)

    def keep(self, ids: torch.Tensor) -> None:
        """Puts aside, on the CPU, what has not been read of the rows at these positions: they change next."""
        with self._lock:
            if self._read == len(self._table):
                return
            rows = ids.cpu() - self._first
            rows = rows[(rows >= self._read) & (rows < len(self._table))]
            rows = rows[self._part[rows] < 0]
            if not len(rows):
                return
            self._part[rows] = len(self._aside)
            self._place[rows] = torch.arange(len(rows), dtype=torch.int32)
            mapped.fetch(self._table, rows)
            self._aside.append(take(self._table, rows.to(self._table.device)).cpu())

    def blocks(self, block_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows in order, once: the number of a block's first row, and the block; good until the next."""
        row_bytes = max(1, self._table[:1].nbytes)
        size = max(1, min(block_bytes // row_bytes, len(self._table)))
        buffer = torch.empty(size, *self._table.shape[1:], dtype=self._table.dtype)
        for start in range(0, len(self._table), size):
            stop = min(start + size, len(self._table))
            step = max(1, PIECE_BYTES // row_bytes)
            for first in range(start, stop, step):
                last = min(first + step, stop)
                self._copy(first, last, buffer[first - start : last - start])
            yield start, buffer[: stop - start]

    def close(self) -> None:
        """Nobody reads any more: rows may change freely."""
        with self._lock:
            self._read = len(self._table)
            self._aside.clear()

    def _copy(self, first: int, last: int, out: torch.Tensor) -> None:
        with self._lock:
            assert first == self._read
            out.copy_(self._table[first:last])
            parts, places = self._part[first:last], self._place[first:last].long()
            for part in torch.unique(parts[parts >= 0]).tolist():
                here = torch.nonzero(parts == part).flatten()
                out[here] = self._aside[part][places[here]]
            self._read = last
