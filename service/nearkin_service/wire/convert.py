"""Values as messages and messages as values."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.timestamp_pb2 import Timestamp
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb
from nearkin.v1.room import BEGINNINGS

from nearkin_service.engines.contract import KeyName, Neighbours
from nearkin_service.errors import DataLossError, InvalidArgumentError
from nearkin_service.values import (
    BuildProgress,
    EmbeddingsState,
    Generation,
    GenerationRemoved,
    PushSpec,
    PushState,
    PushView,
    Retention,
    RunEvent,
    RunRemoved,
    RunView,
)

_DTYPES: Mapping[pb.DType.ValueType, str] = {
    pb.DTYPE_FLOAT32: "float32",
    pb.DTYPE_FLOAT16: "float16",
    pb.DTYPE_BFLOAT16: "bfloat16",
}
_KEYS: Mapping[pb.Key.ValueType, KeyName] = {
    pb.KEY_UNSPECIFIED: "flat",
    pb.KEY_FLAT: "flat",
    pb.KEY_POOLED: "pooled",
    pb.KEY_QACONV: "qaconv",
}
COLUMNS = (pb.TABLE_COLUMN_IDS, pb.TABLE_COLUMN_SCORES)
"""Of a table, in the order in which they are sent."""
_TO_DTYPE = {name: value for value, name in _DTYPES.items()}
_TO_KEY: Mapping[KeyName, pb.Key.ValueType] = {name: value for value, name in _KEYS.items()}
_PUSH_STATES: Mapping[PushState, pb.PushState.ValueType] = {
    PushState.OPEN: pb.PUSH_STATE_OPEN,
    PushState.BUILDING: pb.PUSH_STATE_BUILDING,
    PushState.PUBLISHED: pb.PUSH_STATE_PUBLISHED,
    PushState.FAILED: pb.PUSH_STATE_FAILED,
    PushState.ABORTED: pb.PUSH_STATE_ABORTED,
}
_EMBEDDINGS: Mapping[EmbeddingsState, pb.EmbeddingsState.ValueType] = {
    EmbeddingsState.KEPT: pb.EMBEDDINGS_STATE_KEPT,
    EmbeddingsState.FLUSHING: pb.EMBEDDINGS_STATE_FLUSHING,
    EmbeddingsState.DROPPED: pb.EMBEDDINGS_STATE_DROPPED,
    EmbeddingsState.LOST: pb.EMBEDDINGS_STATE_LOST,
}


def timestamp(seconds: float) -> Timestamp:
    return Timestamp(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))


def dtype_name(field: str, value: pb.DType.ValueType) -> str:
    """InvalidArgumentError: not one of the protocol's dtypes."""
    if value not in _DTYPES:
        raise InvalidArgumentError(field, f"{value} is not DTYPE_FLOAT32, DTYPE_FLOAT16 or DTYPE_BFLOAT16")
    return _DTYPES[value]


def push_spec(request: pb.BeginPushRequest) -> PushSpec:
    """What a BeginPush is of. InvalidArgumentError: a field is out of its range."""
    if request.key not in _KEYS:
        raise InvalidArgumentError("key", f"{request.key} is not a key of this version of the protocol")
    retention = request.retention
    timeout = request.build_timeout
    return PushSpec(
        run=request.run,
        epoch=request.epoch,
        num_classes=request.num_classes,
        row_shape=tuple(request.row_shape),
        dtype=dtype_name("dtype", request.dtype),
        k=request.k,
        key=_KEYS[request.key],
        engine=request.engine or "auto",
        retention=Retention(retention.keep_embeddings, retention.keep_tables, retention.keep_every),
        build_timeout=timeout.seconds + timeout.nanos / 1e9 if request.HasField("build_timeout") else None,
        qaconv_candidates=request.qaconv_candidates,
        qaconv_weights=tuple(request.qaconv_weights),
        base_generation=request.base_generation,
    )


def rows_at(request: pb.BeginPushRequest) -> int:
    """The byte where its sender would have row 0 begin. InvalidArgumentError: there is no such choice."""
    if request.rows_at not in BEGINNINGS:
        raise InvalidArgumentError("rows_at", f"{request.rows_at} is not 0, 16, 32 or 48")
    return request.rows_at


def require_place(message: bulk.WriteRows) -> None:
    """DataLossError: it does not say any more where its rows belong."""
    if message.misplaced:
        raise DataLossError(
            f"a message of rows from {message.row_start} on does not match its place_crc32c: it was "
            "damaged on the way; send it again"
        )


def stored(view: PushView) -> pb.WriteRowsResponse:
    return pb.WriteRowsResponse(rows_stored=len(view.stored), complete=view.complete, push=push(view))


def push(view: PushView) -> pb.Push:
    return pb.Push(
        push_id=view.push_id,
        run=view.spec.run,
        epoch=view.spec.epoch,
        state=_PUSH_STATES[view.state],
        num_classes=view.spec.num_classes,
        row_bytes=view.spec.row_bytes,
        rows_stored=len(view.stored),
        stored=[pb.RowRange(start=r.start, count=len(r)) for r in view.stored],
        generation=view.generation,
        error=view.error,
        absent_count=view.absent_count,
        created=timestamp(view.created),
    )


def generation(found: Generation) -> pb.Generation:
    message = pb.Generation(
        run=found.run,
        generation=found.number,
        epoch=found.epoch,
        num_classes=found.spec.num_classes,
        row_shape=found.spec.row_shape,
        dtype=_TO_DTYPE[found.spec.dtype],
        k=found.spec.k,
        key=_TO_KEY[found.spec.key],
        engine=found.engine,
        device=found.device,
        exact=found.exact,
        recomputed_rows=found.recomputed_rows,
        absent_count=found.absent_count,
        published=timestamp(found.published),
        build_seconds=found.build_seconds,
        stage_seconds=found.stage_seconds,
        embeddings=_EMBEDDINGS[found.embeddings],
        ids_crc32c=found.ids.whole,
        scores_crc32c=found.scores.whole,
        versions=found.versions,
        pinned=found.pinned,
        push_id=found.push_id,
        base_generation=found.spec.base_generation,
    )
    if found.recall is not None:
        recall = found.recall
        message.recall.CopyFrom(
            pb.Recall(value=recall.value, low=recall.low, high=recall.high, sampled_rows=recall.sampled_rows)
        )
    return message


def run(view: RunView) -> pb.Run:
    return pb.Run(
        run=view.name,
        created=timestamp(view.created),
        newest=generation(view.newest) if view.newest else None,
        generations=view.generations,
        bytes_on_disk=view.bytes_on_disk,
        pushes=[push(each) for each in view.pushes],
    )


def run_event(event: RunEvent, seconds: float) -> pb.RunEvent:
    """An event as it happened `seconds` after 1970."""
    message = pb.RunEvent(time=timestamp(seconds))
    match event:
        case RunView():
            message.snapshot.CopyFrom(run(event))
        case PushView():
            message.push.CopyFrom(push(event))
        case BuildProgress():
            message.progress.CopyFrom(progress(event))
        case Generation():
            message.published.CopyFrom(generation(event))
        case GenerationRemoved(number=number):
            message.removed_generation = number
        case RunRemoved():
            message.run_removed = True
    return message


def progress(event: BuildProgress) -> pb.BuildProgress:
    return pb.BuildProgress(
        push_id=event.push_id,
        epoch=event.epoch,
        stage=event.stage,
        rows_done=event.rows_done,
        rows_total=event.rows_total,
        rows_per_second=event.rows_per_second,
        seconds_left=event.seconds_left,
    )


def nearest_response(found: Generation, neighbours: Neighbours) -> bytes:
    """The serialised reply; meant for another thread than the event loop's."""
    rows = [
        pb.Neighbours(ids=ids, scores=scores)
        for ids, scores in zip(neighbours.ids.tolist(), neighbours.scores.tolist(), strict=True)
    ]
    return pb.NearestResponse(generation=found.number, epoch=found.epoch, rows=rows).SerializeToString()
