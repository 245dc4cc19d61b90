"""Answers as JSON: one line per answer, the fields of the values, and `null` where a score is -inf."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from typing import Any

import numpy as np

from nearkin_client.analysis import NearestPairs
from nearkin_client.cli.names import ClassNames
from nearkin_client.values import NearestClasses, NeighbourTable

_ROWS_AT_A_TIME = 256


def emit(value: Any) -> None:
    """Print one answer as one line."""
    answer = plain(value)
    text = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:  # escapes of JSON's own: any other would not be JSON
        text = json.dumps(answer, separators=(",", ":"))
    print(text, flush=True)  # noqa: T201


def plain(value: Any) -> Any:
    """Dataclasses, arrays and times as what JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(each) for each in (value.tolist() if isinstance(value, np.ndarray) else value)]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def nearest(classes: list[int], found: NearestClasses, names: ClassNames) -> dict[str, Any]:
    """Queries with their neighbours; names where there are any."""
    rows = zip(classes, found.ids, found.scores, strict=True)
    return {
        "generation": found.generation,
        "epoch": found.epoch,
        "rows": [
            _named(one, names)
            | {
                "neighbours": [
                    _named(int(other), names) | {"score": plain(float(score))}
                    for other, score in zip(ids, scores, strict=True)
                ]
            }
            for one, ids, scores in rows
        ],
    }


def conflicts(found: NeighbourTable, pairs: NearestPairs, most: int, names: ClassNames) -> dict[str, Any]:
    """The first pairs, and how many there are."""
    rows = [
        {"classes": [_named(first, names), _named(second, names)], "score": score, "mutual": mutual}
        for first, second, score, mutual in pairs.first_few(most)
    ]
    return {
        "generation": found.generation,
        "epoch": found.epoch,
        "pairs_in_all": len(pairs),
        "pairs": rows,
    }


def _named(class_id: int, names: ClassNames) -> dict[str, Any]:
    return {"class": class_id} | ({"name": names.get(class_id)} if names else {})


def emit_table(found: NeighbourTable) -> None:
    """Print a table as one line, some rows at a time: as objects it takes thirty times its memory."""
    sys.stdout.write(f'{{"generation":{found.generation},"epoch":{found.epoch},"k":{found.k},"rows":[')
    for start in range(0, len(found), _ROWS_AT_A_TIME):
        text = json.dumps(list(_rows(found, start, start + _ROWS_AT_A_TIME)), separators=(",", ":"))
        sys.stdout.write(("," if start else "") + text[1:-1])
    print("]}", flush=True)  # noqa: T201


def _rows(found: NeighbourTable, start: int, stop: int) -> Iterator[dict[str, Any]]:
    ids = found.ids[start:stop].tolist()
    for row, class_id in enumerate(range(found.row_start + start, found.row_start + start + len(ids))):
        one: dict[str, Any] = {"class": class_id, "ids": ids[row]}
        if found.scores is not None:
            one["scores"] = plain(found.scores[start + row])
        yield one
