"""Nearest-class queries, cut into requests that fit the service's limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from nearkin.v1 import neighbours_pb2 as pb
from numpy.typing import NDArray

from nearkin_client import decoding
from nearkin_client.arrays import as_rows
from nearkin_client.errors import InvalidArgument, invalid
from nearkin_client.numbers import MOST_INT32
from nearkin_client.patience import Deadline
from nearkin_client.values import NearestClasses, ServerInfo
from nearkin_client.wire import Wire

MOST_QUERIES = 1024
"""Queries per request, whatever the service allows, so that answers stay small as well."""
MOST_ANSWERS = 1 << 20
"""Queries times neighbours per request."""

Query = pb.ClassIds | pb.Vectors


def class_batches(
    classes: Sequence[int] | NDArray[np.integer[Any]], k: int | None, info: ServerInfo
) -> Iterator[Query]:
    """Class ids in requests of their own."""
    ids = np.asarray(classes)
    if ids.dtype.kind != "i":  # Python's integers have any size, and NumPy makes of them what it can
        for each in np.asarray(classes, object).flat:
            if isinstance(each, (int, np.integer)) and not 0 <= each <= MOST_INT32:
                invalid("classes", int(each), f"is not within 0..{MOST_INT32}")
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        invalid(
            "classes",
            f"{ids.dtype.name}{list(ids.shape)}",
            "is not one or more class ids: integers [Q]",
        )
    size = _most_queries(k, info)
    return (pb.ClassIds(ids=ids[lo : lo + size].tolist()) for lo in range(0, len(ids), size))


def vector_batches(vectors: Any, k: int | None, info: ServerInfo) -> Iterator[Query]:
    """Vectors in requests of their own."""
    rows = as_rows("vectors", vectors, None)
    if not rows.count:
        invalid("vectors.shape", (0, *rows.shape), "holds no vector")
    size = min(_most_queries(k, info), max(1, (info.chunk_bytes or 1 << 20) // rows.row_bytes))
    dtype = decoding.DTYPES[rows.dtype]
    for lo in range(0, rows.count, size):
        hi = min(lo + size, rows.count)
        yield pb.Vectors(count=hi - lo, dtype=dtype, payload=bytes(rows.payload(lo, hi)))


def ask_nearest(
    wire: Wire, request: pb.NearestRequest, batches: Iterator[Query], timeout: float | None
) -> NearestClasses:
    """Ask batch after batch. The first answer fixes the generation of the others."""
    deadline = Deadline(timeout if timeout is not None else wire.patience.call)
    answers: list[pb.NearestResponse] = []
    asked = 0
    for batch in batches:
        if isinstance(batch, pb.ClassIds):
            request.classes.CopyFrom(batch)
        else:
            request.vectors.CopyFrom(batch)
        try:
            answer = wire.ask(
                lambda stub: stub.Nearest,
                request,
                doing="asking for nearest classes",
                timeout=deadline.remaining,
            )
        except InvalidArgument as error:
            if not asked or isinstance(batch, pb.ClassIds):
                raise
            raise InvalidArgument(
                f"{error.message} (vector 0 is number {asked} of those given)", field=error.field
            ) from error
        asked += batch.count if isinstance(batch, pb.Vectors) else len(batch.ids)
        request.generation = answer.generation
        answers.append(answer)
    return decoding.nearest(answers)


def _most_queries(k: int | None, info: ServerInfo) -> int:
    allowed = info.limits["max_nearest_queries"] or MOST_QUERIES
    return min(MOST_QUERIES, allowed, max(1, MOST_ANSWERS // (k or 1)))
