"""Beginning a push: its arguments are checked as the service checks them, before any byte is sent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from google.protobuf.duration_pb2 import Duration
from nearkin.v1 import neighbours_pb2 as pb
from numpy.typing import NDArray

from nearkin_client import ranges
from nearkin_client.arrays import Rows
from nearkin_client.decoding import DTYPES, KEYS, chosen
from nearkin_client.errors import InvalidArgument, invalid
from nearkin_client.lane import SMALLEST_BYTES
from nearkin_client.numbers import MOST_INT32, MOST_INT64
from nearkin_client.shared import best_begin
from nearkin_client.values import Retention

MOST_ABSENT = 1 << 20
"""Of one message: five bytes each at most."""
_MOST_SECONDS = 366 * 86_400


def begin_request(
    rows: Rows,
    *,
    run: str,
    epoch: int,
    row_start: int,
    num_classes: int | None,
    k: int,
    key: str,
    engine: str,
    absent: Iterable[int],
    commit: bool,
    shared: bool = False,
    base_generation: int | None = None,
    qaconv_candidates: int | None = None,
    qaconv_weights: Any = None,
    retention: Retention | None = None,
    build_timeout: float | None = None,
) -> pb.BeginPushRequest:
    """Check the arguments of one push, as the service does, before any byte is sent."""
    classes = _num_classes(rows.count, row_start, num_classes)
    for field, number in (("epoch", epoch), ("base_generation", base_generation or 0)):
        if not 0 <= number <= MOST_INT64:
            invalid(field, number, f"is not in 0..{MOST_INT64}")
    if not 1 <= k <= classes - 1:
        invalid("k", k, f"is not in 1..num_classes - 1 = {classes - 1}")
    if not 0 <= row_start <= row_start + rows.count <= classes:
        stop = row_start + rows.count
        span = f"{row_start}..{stop - 1}"
        raise InvalidArgument(f"row_start: rows {span} are not within 0..{classes - 1}", field="row_start")
    if key != "flat" and len(rows.shape) != 3:
        invalid("key", key, f"compares feature maps [C, H, W]; these rows are {list(rows.shape)}")
    return pb.BeginPushRequest(
        run=run,
        epoch=epoch,
        num_classes=classes,
        row_shape=rows.shape,
        dtype=chosen("wire_dtype", rows.dtype, DTYPES),
        k=k,
        key=chosen("key", key, KEYS),
        engine=engine,
        absent=_absent(absent, classes),
        commit_when_complete=commit and base_generation is None,
        base_generation=base_generation,
        accept_shared_memory=shared and rows.count > 0,
        accept_bulk_lane=shared or rows.count * rows.row_bytes >= SMALLEST_BYTES,
        row_start=row_start,
        row_count=rows.count,
        rows_at=best_begin(rows, row_start) if shared else None,
        qaconv_candidates=_candidates(qaconv_candidates, key, k),
        qaconv_weights=_weights(qaconv_weights, key, rows.shape),
        retention=None if retention is None else _retention(retention),
        build_timeout=None if build_timeout is None else _duration("build_timeout", build_timeout),
    )


def _retention(retention: Retention) -> pb.Retention:
    numbers = asdict(retention)
    for name, number in numbers.items():
        if not 0 <= number <= MOST_INT32:
            invalid(f"retention.{name}", number, f"is not in 0..{MOST_INT32}")
    return pb.Retention(**numbers)


def _duration(field: str, seconds: float) -> Duration:
    if not 0 < seconds <= _MOST_SECONDS:
        invalid(field, seconds, "is not more than 0 and at most a year, in seconds")
    duration = Duration()
    duration.FromNanoseconds(max(1, round(seconds * 1e9)))
    return duration


def begin_parts(request: pb.BeginPushRequest) -> Iterator[pb.BeginPushRequest]:
    """The request as several that any service takes, if it names many absent classes; the last counts."""
    absent = list(request.absent) if len(request.absent) > MOST_ABSENT else []
    while len(absent) > MOST_ABSENT:
        request.absent[:] = absent[-MOST_ABSENT:]
        part = pb.BeginPushRequest()
        part.CopyFrom(request)
        part.commit_when_complete = part.accept_shared_memory = part.accept_bulk_lane = False
        yield part
        del absent[-MOST_ABSENT:]
    if absent:
        request.absent[:] = absent
    yield request


def _candidates(candidates: int | None, key: str, k: int) -> int:
    if candidates is None:
        return 0
    if key != "qaconv":
        invalid("qaconv_candidates", candidates, f'is only for key "qaconv", not for {key!r}')
    if candidates < k:
        invalid("qaconv_candidates", candidates, f"is less than k = {k}")
    return candidates


def _weights(weights: Any, key: str, shape: tuple[int, ...]) -> list[float]:
    if weights is None:
        return []
    found = np.asarray(weights, np.float32)
    if key != "qaconv":
        invalid("qaconv_weights", f"{found.size} weights", f'are only for key "qaconv", not for {key!r}')
    wanted = 2 * math.prod(shape[1:])
    if found.shape != (wanted,):
        invalid("qaconv_weights", list(found.shape), f"is not [2 * H * W] = [{wanted}]")
    if not np.isfinite(found).all():
        raise InvalidArgument("qaconv_weights: holds NaN or Inf", field="qaconv_weights")
    numbers: list[float] = found.tolist()
    return numbers


def _num_classes(count: int, row_start: int, num_classes: int | None) -> int:
    if num_classes is None and row_start:
        problem = f"say how many there are, as these rows start at {row_start}"
        raise InvalidArgument(f"num_classes: {problem}", field="num_classes")
    classes = count if num_classes is None else num_classes
    if classes < 2:
        invalid("num_classes", classes, "is not 2 or greater")
    return classes


def _absent(absent: Iterable[int], classes: int) -> Sequence[int]:
    ids = _class_ids("absent", list(absent))
    if not ids.size:
        return ()
    if ids[0] < 0 or ids[-1] >= classes:
        wrong = ids[0] if ids[0] < 0 else ids[-1]
        invalid("absent", int(wrong), f"is not within 0..{classes - 1}")
    found: list[int] = ids.tolist()
    return found


def _class_ids(field: str, given: Any) -> NDArray[Any]:
    """Each once, in order."""
    ids = np.asarray(given)
    if ids.size and ids.dtype.kind not in "iu":
        invalid(field, ids.dtype.name, "is not the dtype of class ids, which are integers")
    return np.unique(ids)


def changed_ranges(changed: Any, row_start: int, count: int) -> list[ranges.Range]:
    """The rows to send, as ranges of classes."""
    ids = _class_ids("changed_rows", changed)
    if not ids.size:
        return []
    if ids[0] < row_start or ids[-1] >= row_start + count:
        wrong = ids[0] if ids[0] < row_start else ids[-1]
        invalid(
            "changed_rows", int(wrong), f"is not among the rows given, {row_start}..{row_start + count - 1}"
        )
    breaks = np.flatnonzero(np.diff(ids) > 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(ids, breaks)]
