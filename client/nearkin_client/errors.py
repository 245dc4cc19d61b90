"""What can go wrong, one class per meaning.

    NearkinError
    ├── InvalidArgument (ValueError)     fix your code: the message names the field and the way out
    ├── Unauthenticated                  fix your set-up: no token, or one the service does not know; or the
    │                                    service shows no certificate, or none to be trusted
    ├── PermissionDenied                 fix your set-up: the token does not reach this far, or the unix
    │                                    socket is another user's
    ├── Unimplemented                    fix your set-up: the service is older than what was asked of it
    ├── NotFound (LookupError)           expected: no such run, generation, push
    ├── AlreadyExists                    expected: the epoch, or a row, is there with other content
    ├── FailedPrecondition               expected: the thing exists, and is not in a state that allows this
    │   └── PushFailed                   expected: the push was aborted, or its table could not be built
    ├── DeadlineExceeded (TimeoutError)  expected: no answer in time
    │   └── NotReadyInTime               expected: the awaited epoch was not published in time
    ├── Unavailable (ConnectionError)    expected: the service could not be reached for as long as we tried
    ├── ResourceExhausted                expected: a limit of the service; the message names it
    ├── DataLoss                         rare: bytes were damaged, on the way or on the service's disk
    ├── Cancelled                        rare: the call was cancelled, by the service or by closing the client
    ├── ServiceInternalError             never expected: a fault of the service; please report it
    └── ServiceNotInstalled              fix your set-up: a private service was asked for and is not installed

"Expected" ones belong to normal operation: catch them where you can go on. The others mean that code or
configuration has to change. The client already repeated what is safe to repeat before it raised any of them.
"""

# ruff: noqa: N818 - the names are those of the status codes, as every gRPC user knows them
from __future__ import annotations

import errno
import os
from typing import Any, NoReturn, cast

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]


class NearkinError(Exception):
    """Base of everything this package raises on purpose.

    Attributes:
        message: what happened, as one line.
        field: the argument that is to blame, if one is known ("k", "row_start", ...).
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        return self.message


class InvalidArgument(NearkinError, ValueError):
    """An argument is out of its range, or rows hold NaN, Inf or zeros. Fix the caller."""


class Unauthenticated(NearkinError):
    """The service wants a token (`token=` or NEARKIN_TOKEN), or does not know the one given.

    Or it shows no certificate that `ca_certificate=` vouches for.
    """


class PermissionDenied(NearkinError):
    """The token is known and does not allow this."""


class Unimplemented(NearkinError):
    """The service does not have this call or feature; it is older than this client."""


class NotFound(NearkinError, LookupError):
    """No such run, generation or push."""


class AlreadyExists(NearkinError):
    """The epoch was begun with other arguments, or a row is there already with other bytes."""


class FailedPrecondition(NearkinError):
    """The thing exists and is not in a state that allows this."""


class PushFailed(FailedPrecondition):
    """The push was aborted, or its table could not be built; the epoch may be pushed again."""


class DeadlineExceeded(NearkinError, TimeoutError):
    """No answer within the call's deadline."""


class NotReadyInTime(DeadlineExceeded):
    """The awaited epoch was not published within the deadline; waiting again is fine."""


class Unavailable(NearkinError, ConnectionError):
    """The service could not be reached, or is starting or draining, for as long as was tried."""


class ResourceExhausted(NearkinError):
    """A limit of the service; the message names it."""


class DataLoss(NearkinError):
    """Bytes were damaged on the way, or what is stored on the service's disk is damaged."""


class Cancelled(NearkinError):
    """The call was cancelled before it ended."""


class ServiceInternalError(NearkinError):
    """A fault of the service."""


class ServiceNotInstalled(NearkinError):
    """A private service was asked for, and `nearkin-serve` is not installed here."""


ERROR_OF_CODE: dict[grpc.StatusCode, type[NearkinError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ABORTED: FailedPrecondition,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.DATA_LOSS: DataLoss,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: ServiceInternalError,
    grpc.StatusCode.UNKNOWN: ServiceInternalError,
}


_UNTRUSTED = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "Hostname Verification Check failed")
_NEVER_CONNECTED, _CLOSED = "failed to connect to all addresses", "Socket closed"
_CLOSED_HINT = (
    "it takes connections and closes them: does it ask for TLS, or for a client certificate that it knows?"
)


def error_from_rpc(error: grpc.RpcError) -> NearkinError:
    """The error class of a failed call, with the service's message and the field it names."""
    code, details = status_of(error)
    if locked_out(error):
        return PermissionDenied(
            f"user {os.getuid()} may not open the service's unix socket: run as the user of the service, or "
            f"use its host:port ({details})"
        )
    if untrusted(error):
        return Unauthenticated(
            f"the service does not show a certificate that ca_certificate= vouches for ({details})",
            field="ca_certificate",
        )
    if code is grpc.StatusCode.UNAVAILABLE and _NEVER_CONNECTED in details and _CLOSED in details:
        details += f" ({_CLOSED_HINT})"
    return ERROR_OF_CODE.get(code, ServiceInternalError)(details or code.name, field=_blamed_field(error))


def silent(error: grpc.RpcError) -> bool:
    """Whether the deadline passed without a word from the service: what is said then is gRPC's."""
    return status_of(error) == (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


def locked_out(error: grpc.RpcError) -> bool:
    """Whether the operating system keeps us from the service's unix socket, which waiting does not change."""
    code, details = status_of(error)
    return code is grpc.StatusCode.UNAVAILABLE and "unix:" in details and os.strerror(errno.EACCES) in details


def untrusted(error: grpc.RpcError) -> bool:
    """Whether the service speaks no TLS, or its certificate is another's or expired: no wait changes that."""
    code, details = status_of(error)
    return code is grpc.StatusCode.UNAVAILABLE and any(word in details for word in _UNTRUSTED)


def status_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """The status code and message of a failed call: an RpcError that grpcio raises is a Call as well."""
    call = cast("Any", error)
    return call.code(), call.details() or ""


def _blamed_field(call: grpc.RpcError) -> str | None:
    """The first field of the google.rpc.BadRequest detail, if the service sent one."""
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the detail contradicts the status: a proxy rewrote one of them
        return None
    for detail in status.details if status is not None else ():
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request) and bad_request.field_violations:
            return str(bad_request.field_violations[0].field)
    return None


def invalid(field: str, value: object, problem: str) -> NoReturn:
    """Raise `InvalidArgument` for one argument, worded as the service words it."""
    raise InvalidArgument(f"{field}: {value!r} {problem}", field=field)
