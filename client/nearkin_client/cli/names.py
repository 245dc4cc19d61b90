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
