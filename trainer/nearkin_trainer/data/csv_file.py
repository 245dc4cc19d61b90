"""Data as a CSV file: `label,path,split,is_query,is_gallery` and optionally `camera`.

Paths are relative to the CSV file. `split` is `train` or `validation`; the two flags matter for validation
only.
"""

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearkin_trainer.data.queries import choose_queries
from nearkin_trainer.data.values import DataSet, ImageList, number_cameras, number_names

logger = logging.getLogger("nearkin.trainer.data")

_REQUIRED = ("label", "path", "split")
_OPTIONAL = ("is_query", "is_gallery", "camera")
_TOO_MANY = "fields beyond the last column"
_YES = {"1", "1.0", "true", "t", "yes", "y"}
_NO = {"0", "0.0", "false", "f", "no", "n", "", "nan", "none"}


@dataclass(frozen=True)
class _Row:
    label: str
    path: Path
    split: str
    is_query: bool
    is_gallery: bool
    camera: str


def read_csv(path: Path) -> DataSet:
    """Reads such a file.

    Raises:
        ValueError: it is no CSV file, a column is missing or a value makes no sense; the message names file,
            line and column.
    """
    try:
        rows = _rows(path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a CSV file; it must be text in UTF-8: {error}") from error
    train = [row for row in rows if row.split == "train"]
    validation = [row for row in rows if row.split == "validation"]
    if not train:
        raise ValueError(f"{path}: no row has split 'train'")
    train_images, classes = _images(train)
    images, names = _images(validation)
    query, gallery = choose_queries(
        images, [row.is_query for row in validation], [row.is_gallery for row in validation]
    )
    return DataSet(train_images, classes, query, gallery, names)


def _rows(path: Path) -> list[_Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, restkey=_TOO_MANY, skipinitialspace=True)
        reader.fieldnames = _columns(path, reader.fieldnames or ())
        return [_row(path, reader.line_num, record) for record in reader]


def _columns(path: Path, header: Sequence[str]) -> list[str]:
    names = [name.strip() for name in header]
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}, only {', '.join(names or ['none'])}; "
            "expected label,path,split,is_query,is_gallery and optionally camera"
        )
    for name in (*_REQUIRED, *_OPTIONAL):
        if names.count(name) > 1:
            raise ValueError(f"{path}: two columns are called {name}")
    return names


def _row(path: Path, line: int, record: Mapping[str, Any]) -> _Row:
    def text(column: str) -> str:
        return (record.get(column) or "").strip()

    surplus = [value for value in record.get(_TOO_MANY, ()) if value.strip()]
    if surplus:
        raise ValueError(
            f"{path}, line {line}: more fields than columns, the last is {surplus[-1]!r}; "
            "text that holds a comma must be in quotes"
        )
    for column in ("label", "path"):
        if not text(column):
            raise ValueError(f"{path}, line {line}: {column} is empty")
    split = text("split").lower()
    if split not in {"train", "validation"}:
        raise ValueError(f"{path}, line {line}: split={text('split')!r} is neither 'train' nor 'validation'")
    flags = {}
    for column in ("is_query", "is_gallery"):
        value = text(column).lower()
        if value not in _YES | _NO:
            raise ValueError(
                f"{path}, line {line}: {column}={text(column)!r} is not 0, 1, true, false or empty"
            )
        flags[column] = value in _YES
    return _Row(text("label"), path.parent / text("path"), split, **flags, camera=text("camera"))


def _images(rows: list[_Row]) -> tuple[ImageList, tuple[str, ...]]:
    labels, names = number_names([row.label for row in rows])
    cameras = number_cameras([row.camera for row in rows])
    return ImageList(tuple(row.path for row in rows), labels, cameras), names
