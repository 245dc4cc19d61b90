"""Class names from a file that a person has."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from nearkin_client.errors import InvalidArgument

ClassNames = Mapping[int, str]


def read_names(path: Path | None) -> ClassNames:
    """Class id to name, from a CSV (`class,name`, a header is fine) or one name per line, class 0 first."""
    if path is None:
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = [row for row in csv.reader(lines) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidArgument(f"names: cannot read {path}: {error}", field="names") from error
    if all(len(row) == 1 for row in rows):
        return {number: row[0] for number, row in enumerate(rows)}
    return _by_id(rows, path)


def resolved(given: list[str], names: ClassNames) -> list[int]:
    """Class ids from what a person typed: an id, or a name of the file."""
    by_name = {name: number for number, name in names.items()}
    return [by_name[each] if each in by_name else _class_id(each, names) for each in given]


def _class_id(text: str, names: ClassNames) -> int:
    if not text.isdecimal():
        known = "nor a name in the file" if names else "and names need --names FILE"
        raise InvalidArgument(f"class: {text!r} is not a class id, {known}", field="class")
    return int(text)


def _by_id(rows: list[list[str]], path: Path) -> ClassNames:
    body = rows if rows[0][0].strip().isdigit() else rows[1:]
    names: dict[int, str] = {}
    for row in body:
        if len(row) < 2 or not row[0].strip().isdigit():
            raise InvalidArgument(
                f"names: {path} has the line {','.join(row)!r}; expected `class id,name`", field="names"
            )
        names[int(row[0])] = row[1]
    return names
