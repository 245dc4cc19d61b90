"""Checkpoints: one file, written whole or not at all, without pickle.

A checkpoint is an uncompressed NumPy archive. A tree of dicts, lists, numbers, strings and tensors is taken
apart into its arrays (`a0`, `a1`, ...) and one JSON text (`tree`) that says where they belong. bfloat16
tensors travel as their bits. Large tensors can be left in the file and read a few rows at a time.
"""

import contextlib
import io
import json
import math
import os
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

FORMAT = "nearkin checkpoint 1"

Keys = tuple[str | int, ...]
_PIECE_BYTES = 4 * 2**20
_UNFINISHED = ".tmp"
GO_ON = "Mend that, and --resume continues after the last finished epoch"


def save(path: Path, tree: dict[str, Any]) -> None:
    """Writes `tree` to `path`: after a crash at any moment, `path` is either the old file or the new one.

    Raises:
        TypeError: something in the tree is not a dict, list, tuple, number, string, None or tensor.
        ValueError: the disk does not take it; nothing is left of what was written.
    """
    arrays: dict[str, NDArray[Any]] = {}
    text = json.dumps({FORMAT: _take_apart(tree, arrays)})
    arrays["tree"] = np.frombuffer(text.encode(), dtype=np.uint8)
    try:
        with atomic_file(path) as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        size, why = sum(array.nbytes for array in arrays.values()), error.strerror or error
        raise ValueError(
            f"the checkpoint {path} of {size / 2**30:.1f} GiB cannot be written: {why}; it needs room beside "
            f"the one before it. {GO_ON}"
        ) from error


def load(path: Path, leave: Callable[[Keys], bool] = lambda _: False) -> dict[str, Any]:
    """Reads what `save` wrote; tensors are on the CPU, tuples have become lists.

    Args:
        path: of the file.
        leave: whether a tensor stays in the file, as a `Stored`, by the keys that lead to it in the tree.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint, or damaged.
    """
    try:
        zipfile.ZipFile(path).close()  # anything else NumPy takes for a pickle, and says how to load it
        with np.load(path, allow_pickle=False) as archive:
            content = json.loads(archive["tree"].tobytes())
            tree = _put_together(content[FORMAT], archive, _Left(path, leave))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise unreadable(path, error) from error
    assert isinstance(tree, dict)
    return tree


def unreadable(path: Path, error: Exception | str) -> ValueError:
    """What `load` raises for a file that is damaged or something else."""
    return ValueError(
        f"{path} is not a checkpoint that can be read: {error}. "
        "Put a copy in its place, or begin again with --overwrite"
    )


Put = Callable[[torch.Tensor, int, torch.Tensor], None]


@dataclass(frozen=True)
class Stored:
    """A tensor `[n, ...]` that was left in a file, which should stay as it is as long as this is used."""

    path: Path
    name: str
    dtype: torch.dtype

    def read_into(self, table: torch.Tensor, first: int, put: Put) -> int:
        """Puts row i in `table[first + i]`, wherever that is a row of the table; how many those are.

        Args:
            table: takes the rows.
            first: where the first one belongs; may lie before or behind the table.
            put: called with the table, a position in it, and rows that belong there.

        Raises:
            ValueError: the file is damaged, or rows have another shape.
        """
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{self.name}.npy") as file:
                return self._copy(file, table, first, put)
        except Exception as error:
            raise unreadable(self.path, error) from error

    def _copy(self, file: IO[bytes], table: torch.Tensor, first: int, put: Put) -> int:
        (count, *shape), dtype = _npy_header(file)
        if tuple(shape) != table.shape[1:]:
            raise ValueError(f"rows of {self.name} are {shape} and should be {list(table.shape[1:])}")
        row_bytes = dtype.itemsize * math.prod(shape)
        step = max(1, _PIECE_BYTES // max(1, row_bytes))
        copied = 0
        # Also what is not wanted is read, because the checksum is that of the whole.
        for start in range(0, count, step):
            rows = min(step, count - start)
            read = torch.frombuffer(bytearray(file.read(rows * row_bytes)), dtype=self.dtype)
            skip = max(0, -(first + start))
            wanted = read.view(rows, *shape)[skip : max(skip, len(table) - first - start)]
            if len(wanted):
                put(table, first + start + skip, wanted)
            copied += len(wanted)
        file.read(1)  # the end, where the checksum is compared
        return copied


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    assert version == (1, 0), version  # for anything but tables of tables
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    assert not fortran
    return shape, dtype


class atomic_file:  # noqa: N801 - used like open()
    """A binary file that appears under its name only when the block ends well, and then safely on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}{_UNFINISHED}")

    def __enter__(self) -> io.BufferedWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")
        return self._file

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._temporary.replace(self._path)
                _sync_directory(self._path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what could not be written before cannot be now
                self._file.close()


def remove_unfinished(folder: Path) -> None:
    """Removes what processes that were killed had begun to write; nobody may be writing there."""
    for file in folder.glob(f".*.*[0-9]{_UNFINISHED}"):
        file.unlink(missing_ok=True)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_apart(node: Any, arrays: dict[str, NDArray[Any]]) -> Any:
    if isinstance(node, torch.Tensor):
        tensor = node.detach().cpu().contiguous()
        name = f"a{len(arrays)}"
        is_bfloat16 = tensor.dtype == torch.bfloat16
        arrays[name] = (tensor.view(torch.int16) if is_bfloat16 else tensor).numpy()
        return {"tensor": name, "dtype": str(tensor.dtype).removeprefix("torch.")}
    if isinstance(node, dict):
        # Pairs, because keys may be numbers (torch optimisers number their parameters), which JSON makes
        # strings.
        return {"dict": [[key, _take_apart(value, arrays)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return {"list": [_take_apart(value, arrays) for value in node]}
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    raise TypeError(f"a checkpoint cannot hold a {type(node).__name__}")


@dataclass(frozen=True)
class _Left:
    """Which tensors stay in the file."""

    path: Path
    leave: Callable[[Keys], bool]


def _put_together(node: dict[str, Any], archive: Any, left: _Left, keys: Keys = ()) -> Any:
    if "tensor" in node:
        if left.leave(keys):
            return Stored(left.path, node["tensor"], getattr(torch, node["dtype"]))
        tensor = torch.from_numpy(archive[node["tensor"]])
        return tensor.view(torch.bfloat16) if node["dtype"] == "bfloat16" else tensor
    if "dict" in node:
        return {key: _put_together(value, archive, left, (*keys, key)) for key, value in node["dict"]}
    if "list" in node:
        return [_put_together(value, archive, left, (*keys, i)) for i, value in enumerate(node["list"])]
    return node["value"]


def seed_everything(*seed: int) -> None:
    """Seeds the generators of Python, NumPy and torch from a few numbers.

    Seeded with (seed, epoch, rank) at each epoch, a job that resumes draws what it would have drawn without
    the interruption; no generator's state needs saving.
    """
    words = np.random.SeedSequence(seed).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - other people's backbones and losses may draw from it
    torch.manual_seed(int(words[2]))
