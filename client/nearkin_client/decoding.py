"""Protobuf messages to the client's values, and names to enum numbers. The only place that knows both."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from nearkin.v1 import neighbours_pb2 as pb

from nearkin_client import values as v
from nearkin_client.errors import invalid

DTYPES: dict[str, pb.DType.ValueType] = {
    "float32": pb.DTYPE_FLOAT32,
    "float16": pb.DTYPE_FLOAT16,
    "bfloat16": pb.DTYPE_BFLOAT16,
}
KEYS: dict[str, pb.Key.ValueType] = {"flat": pb.KEY_FLAT, "pooled": pb.KEY_POOLED, "qaconv": pb.KEY_QACONV}


def chosen(field: str, name: str, options: dict[str, Any]) -> Any:
    """The enum number of a name, or an error that lists the names."""
    if name not in options:
        invalid(field, name, f"is not one of {', '.join(options)}")
    return options[name]


def _named(enum: Any, number: int, prefix: str) -> Any:
    """`pb.KEY_FLAT` -> "flat". A number from a newer service keeps its number as its name."""
    known = number in enum.values()
    return enum.Name(number).removeprefix(prefix).lower() if known else str(number)


def _when(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)


def generation(message: pb.Generation) -> v.Generation:
    """A `Generation` message as a value."""
    recall = message.recall
    return v.Generation(
        run=message.run,
        generation=message.generation,
        epoch=message.epoch,
        num_classes=message.num_classes,
        row_shape=tuple(message.row_shape),
        dtype=_named(pb.DType, message.dtype, "DTYPE_"),
        k=message.k,
        key=_named(pb.Key, message.key, "KEY_"),
        engine=message.engine,
        device=message.device,
        exact=message.exact,
        recall=v.Recall(recall.value, recall.low, recall.high, recall.sampled_rows)
        if message.HasField("recall")
        else None,
        recomputed_rows=message.recomputed_rows,
        absent_count=message.absent_count,
        published=_when(message.published),
        build_seconds=message.build_seconds,
        stage_seconds=MappingProxyType(dict(message.stage_seconds)),
        embeddings=_named(pb.EmbeddingsState, message.embeddings, "EMBEDDINGS_STATE_"),
        base_generation=message.base_generation or None,
        ids_crc32c=message.ids_crc32c,
        scores_crc32c=message.scores_crc32c,
        versions=MappingProxyType(dict(message.versions)),
        pinned=message.pinned,
        push_id=message.push_id,
    )


def push(message: pb.Push) -> v.Push:
    """A `Push` message as a value."""
    return v.Push(
        push_id=message.push_id,
        run=message.run,
        epoch=message.epoch,
        state=_named(pb.PushState, message.state, "PUSH_STATE_"),
        num_classes=message.num_classes,
        row_bytes=message.row_bytes,
        rows_stored=message.rows_stored,
        stored=tuple((each.start, each.start + each.count) for each in message.stored),
        generation=message.generation or None,
        error=message.error,
        absent_count=message.absent_count,
        created=_when(message.created),
    )


def run(message: pb.Run) -> v.Run:
    """A `Run` message as a value."""
    return v.Run(
        run=message.run,
        created=_when(message.created),
        newest=generation(message.newest) if message.HasField("newest") else None,
        generations=message.generations,
        bytes_on_disk=message.bytes_on_disk,
        pushes=tuple(push(each) for each in message.pushes),
    )


def nearest(answers: Sequence[pb.NearestResponse]) -> v.NearestClasses:
    """The rows of one or more answers of the same generation, put together."""
    rows = [row for answer in answers for row in answer.rows]
    ids = np.array([row.ids for row in rows], np.int32).reshape(len(rows), -1)
    scores = np.array([row.scores for row in rows], np.float32).reshape(len(rows), -1)
    return v.NearestClasses(ids, scores, answers[0].generation, answers[0].epoch)


def comparison(message: pb.CompareGenerationsResponse) -> v.Comparison:
    """A comparison as a value."""
    return v.Comparison(
        base_generation=message.base_generation,
        generation=message.generation,
        k=message.k,
        classes_compared=message.classes_compared,
        mean_overlap=message.mean_overlap,
        overlap_deciles=tuple(message.overlap_deciles),
        mean_movement=message.mean_movement if message.HasField("mean_movement") else None,
        most_changed=tuple(_change(each) for each in message.most_changed),
    )


def _change(message: pb.ClassChange) -> v.ClassChange:
    movement = message.movement if message.HasField("movement") else None
    return v.ClassChange(message.class_id, message.overlap, movement)


def server_info(message: pb.ServerInfo) -> v.ServerInfo:
    """What a service says of itself."""
    limits = {each.name: getattr(message.limits, each.name) for each in pb.Limits.DESCRIPTOR.fields}
    return v.ServerInfo(
        version=message.version,
        started=_when(message.started),
        engines=tuple(v.EngineInfo(e.name, e.available, e.reason, e.exact) for e in message.engines),
        devices=tuple(message.devices),
        chunk_bytes=message.chunk_bytes,
        limits=MappingProxyType(limits),
        features=tuple(message.features),
        versions=MappingProxyType(dict(message.versions)),
    )


def event(  # noqa: PLR0911 - one line for each kind
    message: pb.RunEvent,
) -> v.RunEvent | None:
    """One event of a run; None for a kind that this client does not know."""
    time = _when(message.time)
    match message.WhichOneof("event"):
        case "snapshot":
            return v.RunSnapshot(time, run(message.snapshot))
        case "push":
            return v.PushChanged(time, push(message.push))
        case "progress":
            return _progress(time, message.progress)
        case "published":
            return v.GenerationPublished(time, generation(message.published))
        case "removed_generation":
            return v.GenerationRemoved(time, message.removed_generation)
        case "run_removed":
            return v.RunRemoved(time)
    return None


def _progress(time: datetime, message: pb.BuildProgress) -> v.BuildProgress:
    return v.BuildProgress(
        time=time,
        push_id=message.push_id,
        epoch=message.epoch,
        stage=message.stage,
        rows_done=message.rows_done,
        rows_total=message.rows_total,
        rows_per_second=message.rows_per_second,
        seconds_left=message.seconds_left if message.seconds_left >= 0 else None,
    )
