"""Class names from a file that a person has."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from nearkin_client.errors import InvalidArgument

ClassNames = Mapping[int, str]


_NUMBER = re.compile("[0-9]{1,30}")


def read_names(path: Path | None) -> ClassNames:
    """Class id to name, from a CSV (`class,name`, a header is fine) or one name per line, class 0 first.

    An empty line is a class without a name. InvalidArgument: the file cannot be read, or is not one of these.
    """
    if path is None:
        return {}
    rows: list[list[str]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            try:
                rows.extend(reader)
            except csv.Error as error:
                problem = f"names: cannot read line {reader.line_num} of {path}: {error}"
                raise InvalidArgument(
                    f'{problem}; a name that holds a quote is written "in ""quotes"""', field="names"
                ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"names: cannot read {path}: {error}", field="names") from error
    if all(len(row) <= 1 for row in rows):
        return {number: row[0] for number, row in enumerate(rows) if row and row[0]}
    return _by_id([row for row in rows if row], path)


def resolved(given: list[str], names: ClassNames) -> list[int]:
    """Class ids from what a person typed: a name of the file, or an id."""
    by_name: dict[str, list[int]] = {}
    for number, name in names.items():
        by_name.setdefault(name, []).append(number)
    return [_the_only(each, by_name[each]) if each in by_name else _class_id(each, names) for each in given]


def warn_of_strangers(names: ClassNames, num_classes: int) -> None:
    """Where a file names more classes than there are, every name of it may be wrong."""
    last = max(names, default=-1)
    if last >= num_classes:
        print(  # noqa: T201
            f"nearkin: warning: names: the file names class {last}, and there are {num_classes} classes "
            f"(0..{num_classes - 1}); is it of another run, or does it begin with a heading?",
            file=sys.stderr,
        )


def class_number(text: str) -> int | None:
    """The number that a text is, if it is one: plain digits, not those of other scripts."""
    return int(text) if _NUMBER.fullmatch(text) else None


def _the_only(name: str, numbers: list[int]) -> int:
    if len(numbers) > 1:
        few = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        raise InvalidArgument(
            f"class: {name!r} is the name of {len(numbers)} classes ({few}); give the id", field="class"
        )
    return numbers[0]


def _class_id(text: str, names: ClassNames) -> int:
    number = class_number(text)
    if number is None:
        known = "nor a name in the file" if names else "and names need --names FILE"
        raise InvalidArgument(f"class: {text!r} is not a class id, {known}", field="class")
    return number


def _by_id(rows: list[list[str]], path: Path) -> ClassNames:
    heading = not rows[0][0].strip().lstrip("+-").isnumeric()
    names: dict[int, str] = {}
    for row in rows[1:] if heading else rows:
        number = class_number(row[0].strip())
        if len(row) < 2 or number is None:
            raise InvalidArgument(
                f"names: {path} has the line {','.join(row)!r}; expected `class id,name`, "
                "or a name in every line, in quotes if it holds a comma",
                field="names",
            )
        if names.setdefault(number, row[1]) != row[1]:
            raise InvalidArgument(
                f"names: {path} names class {number} twice, {names[number]!r} and {row[1]!r}", field="names"
            )
    return names
