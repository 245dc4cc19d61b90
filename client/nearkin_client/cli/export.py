"""What commands write: neighbour tables, and how a file is refused."""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from rich.console import Console
from rich.progress import track

from nearkin_client.cli.names import ClassNames
from nearkin_client.errors import InvalidArgument
from nearkin_client.values import NeighbourTable

TABLE_ENDINGS = (".npz", ".csv")


def check_ending(path: Path, *endings: str) -> None:
    """Raise before anything is read if the file's ending is not one of these."""
    if path.suffix not in endings:
        raise InvalidArgument(f"out: {path.name!r} must end in {' or '.join(endings)}", field="out")


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its place when all of it is written: what ends before leaves what was there.

    InvalidArgument: it cannot be written.
    """
    try:
        target = path.resolve()  # a link stays one
        if target.exists() and not target.is_file():  # such as a pipe
            with target.open("wb") as file:
                yield file
        else:
            with _in_its_place(target) as file:
                yield file
    except OSError as error:
        raise InvalidArgument(f"out: cannot write {path}: {error.strerror or error}", field="out") from error


@contextmanager
def _in_its_place(target: Path) -> Iterator[BinaryIO]:
    if target.exists():
        target.open("ab").close()  # it may be written to
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with unfinished.open("xb") as file:
            if target.exists():
                shutil.copymode(target, unfinished)
            yield file
        unfinished.replace(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_table(path: Path, table: NeighbourTable, names: ClassNames) -> None:
    """NumPy arrays (.npz), or one line per class and neighbour (.csv), with names where there are any."""
    with writing(path) as file:
        _write_npz(file, table) if path.suffix == ".npz" else _write_csv(file, table, names)


def _write_npz(file: BinaryIO, table: NeighbourTable) -> None:
    arrays: dict[str, Any] = {"ids": table.ids}
    if table.scores is not None:
        arrays["scores"] = table.scores
    np.savez(file, generation=table.generation, epoch=table.epoch, row_start=table.row_start, **arrays)


def _write_csv(binary: BinaryIO, table: NeighbourTable, names: ClassNames) -> None:
    with io.TextIOWrapper(binary, encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        headings = ["class", "rank", "neighbour", "score"]
        writer.writerow([*headings, "class_name", "neighbour_name"] if names else headings)
        console = Console(stderr=True)
        rows = track(table.ids, "writing", console=console, transient=True, disable=not console.is_terminal)
        for index, ids in enumerate(rows):
            scores = table.scores[index] if table.scores is not None else [""] * len(ids)
            for rank, (other, score) in enumerate(zip(ids, scores, strict=True), start=1):
                own = table.row_start + index
                named = [names.get(own, ""), names.get(int(other), "")] if names else []
                writer.writerow([own, rank, other, score, *named])
