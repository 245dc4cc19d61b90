"""Errors as gRPC status: the code, the message, and a `google.rpc` detail where one helps."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]

from nearkin_service import errors

log = logging.getLogger("nearkin.wire")

CODES: Mapping[type[errors.NearkinError], grpc.StatusCode] = {
    errors.InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFoundError: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.DataLossError: grpc.StatusCode.DATA_LOSS,
    errors.LimitExceededError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.UnimplementedError: grpc.StatusCode.UNIMPLEMENTED,
    errors.UnavailableError: grpc.StatusCode.UNAVAILABLE,
    errors.UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotInTimeError: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_MOST_MESSAGE = 2_000
_RETRY_SECONDS = 1


_CODE_OF_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def meaning(name: str, error: Exception) -> Any:
    """The google.rpc.Status in which the call `name` ends.

    Ours by their code, what ran out as a limit, anything else as our mistake: logged, not told.
    """
    error = errors.lacking(error) or error
    if isinstance(error, OSError) and errors.is_denied(error):
        log.warning("%s: %s", name, error)
        error = errors.UnavailableError(f"the service may not use its data directory: {error.strerror}")
    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.EROFS):
        log.error("%s: the disk does not work", name, exc_info=error)
        error = errors.UnavailableError(f"the data directory's disk does not work: {error.strerror}")
    if isinstance(error, errors.NearkinError):
        return _status(error)
    log.error("%s failed", name, exc_info=error)
    message = f"{name} failed inside the service; its log says how"
    return status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message=message)


def code_name(status: Any) -> str:
    """Of a google.rpc.Status."""
    return _CODE_OF_NUMBER[status.code].name


def _status(error: errors.NearkinError) -> Any:
    code = CODES[type(error)]
    status = status_pb2.Status(code=code.value[0], message=str(error)[:_MOST_MESSAGE])
    for detail in _details(error):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def to_status(error: errors.NearkinError) -> grpc.Status:
    """What the caller is to see."""
    sent: grpc.Status = rpc_status.to_status(_status(error))
    return sent


def refuser(count_error: Callable[[str, str], None]) -> Callable[..., Awaitable[None]]:
    """What ends a call that may not be made: `refuse(method, error, context)`."""

    async def refuse(method: str, error: errors.NearkinError, context: Any) -> None:
        status = to_status(error)
        count_error(method, status.code.name)
        await context.abort(status.code, status.details, status.trailing_metadata)

    return refuse


def _details(error: errors.NearkinError) -> list[Message]:
    match error:
        case errors.InvalidArgumentError(field=field, reason=reason):
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=field, description=reason[:_MOST_MESSAGE]
            )
            return [error_details_pb2.BadRequest(field_violations=[violation])]
        case errors.LimitExceededError(limit=limit, reason=reason):
            quota = error_details_pb2.QuotaFailure.Violation(
                subject=limit, description=reason[:_MOST_MESSAGE]
            )
            return [error_details_pb2.QuotaFailure(violations=[quota])]
        case errors.UnavailableError():
            return [error_details_pb2.RetryInfo(retry_delay=Duration(seconds=_RETRY_SECONDS))]
    return []
