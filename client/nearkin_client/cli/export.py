"""What commands write: neighbour tables, and how a file is refused."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nearkin_client.cli.names import ClassNames
from nearkin_client.errors import InvalidArgument
from nearkin_client.values import NeighbourTable

TABLE_ENDINGS = (".npz", ".csv")


def check_ending(path: Path, *endings: str) -> None:
    """Raise before anything is read if the file's ending is not one of these."""
    if path.suffix not in endings:
        raise InvalidArgument(f"out: {path.name!r} must end in {' or '.join(endings)}", field="out")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """InvalidArgument: the file cannot be written."""
    try:
        yield
    except OSError as error:
        raise InvalidArgument(f"out: cannot write {path}: {error.strerror}", field="out") from error


def write_table(path: Path, table: NeighbourTable, names: ClassNames) -> None:
    """NumPy arrays (.npz), or one line per class and neighbour (.csv), with names where there are any."""
    with writing(path):
        _write_npz(path, table) if path.suffix == ".npz" else _write_csv(path, table, names)


def _write_npz(path: Path, table: NeighbourTable) -> None:
    arrays: dict[str, Any] = {"ids": table.ids}
    if table.scores is not None:
        arrays["scores"] = table.scores
    np.savez(path, generation=table.generation, epoch=table.epoch, row_start=table.row_start, **arrays)


def _write_csv(path: Path, table: NeighbourTable, names: ClassNames) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        headings = ["class", "rank", "neighbour", "score"]
        writer.writerow([*headings, "class_name", "neighbour_name"] if names else headings)
        for index, ids in enumerate(table.ids):
            scores = table.scores[index] if table.scores is not None else [""] * len(ids)
            for rank, (other, score) in enumerate(zip(ids, scores, strict=True), start=1):
                own = table.row_start + index
                named = [names.get(own, ""), names.get(int(other), "")] if names else []
                writer.writerow([own, rank, other, score, *named])
