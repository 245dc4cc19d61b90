"""Tables in files that are mapped into memory, for more rows than there is memory.

Rows are read through the mapping, once `fetch` has begun to bring them, and replaced with `put`, which writes
to the file. Both see the same pages.
"""

import mmap
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nearkin_trainer.classes import rows as plain

PIECE_BYTES = 16 * 2**10  # what is written at once the system keeps in one piece, too

_files: dict[int, int] = {}  # by the address that a table is mapped at: the descriptor of its file


def zeros(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros in a file without a name: it is gone when the tensor is, however the process ends.

    Raises:
        ValueError: the disk has no room for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = max(1, torch.Size(shape).numel()) * dtype.itemsize
    with tempfile.TemporaryFile(dir=folder, prefix=".rows-") as file:
        try:
            # Now, because a disk that is full when a page is written kills the process without a word.
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise ValueError(
                f"embedding.place='file': {folder} has no room for {size / 2**30:.1f} GiB of class rows "
                f"({error.strerror}); choose another out, or embedding.storage='bfloat16'"
            ) from error
        memory, descriptor = mmap.mmap(file.fileno(), size), os.dup(file.fileno())
    table = torch.frombuffer(memory, dtype=dtype)[: torch.Size(shape).numel()].view(shape)
    _files[table.data_ptr()] = descriptor
    weakref.finalize(memory, _forget, table.data_ptr())
    return table


def _forget(address: int) -> None:
    os.close(_files.pop(address))


def fetch(table: torch.Tensor, rows: torch.Tensor) -> None:
    """Begins to bring rows from the disk, all at once and nothing but them; does nothing for other tables.

    Touched without this, each would be waited for by itself, and the system would read what lies around it
    too: 128 KiB by default, megabytes on some machines, in the place of rows that are wanted again.
    """
    descriptor = _files.get(table.data_ptr())
    if descriptor is None:
        return
    row_bytes = table[:1].nbytes
    for start in (rows * row_bytes).tolist():
        os.posix_fadvise(descriptor, start, row_bytes, os.POSIX_FADV_WILLNEED)


def put(table: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """`rows.put`, of this and of other tables on the CPU.

    A row that is stored into the mapping makes the system write back everything that it keeps in one piece
    with that, of up to 2 MiB; one that is written to the file, only its own pages, in 50 µs where the
    piece is large, in 3 where it is small.
    """
    descriptor = _files.get(table.data_ptr())
    if descriptor is None:
        plain.put(table, rows, values)
        return
    row_bytes = table[:1].nbytes
    if row_bytes % mmap.PAGESIZE:
        fetch(table, rows)  # the system reads a page before it replaces part of it
    lines = _lines(values)
    for row, line in zip(rows.tolist(), lines, strict=True):
        _write(descriptor, line.data, row * row_bytes)


def put_block(table: torch.Tensor, first: int, values: torch.Tensor) -> None:
    """`put` of consecutive rows: what they replace need not be read from the disk."""
    descriptor = _files.get(table.data_ptr())
    if descriptor is None:
        table[first : first + len(values)] = values
        return
    _write(descriptor, _lines(values).reshape(-1).data, first * table[:1].nbytes)


def _lines(values: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of each row."""
    lines: NDArray[np.uint8] = values.contiguous().view(len(values), -1).view(torch.uint8).numpy()
    return lines


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + PIECE_BYTES], offset + done)
