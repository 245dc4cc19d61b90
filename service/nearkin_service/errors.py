"""What can go wrong, one class per meaning; the wire gives each its status code.

NearkinError
├── InvalidArgumentError      the caller must change the call (also a ValueError)
├── NotFoundError             no such run, generation or push
├── AlreadyExistsError        it is there already, and different
├── FailedPreconditionError   not in the state that this needs
├── DataLossError             bytes are damaged or gone
├── LimitExceededError        a limit of this service, by name
├── UnimplementedError        this version cannot do that
├── UnavailableError          draining: try again elsewhere or later
├── UnauthenticatedError      no token, or none that is known
├── PermissionDeniedError     the token does not reach this far
└── NotInTimeError            what was waited for did not come before the deadline
"""

from __future__ import annotations

import errno


class NearkinError(Exception):
    """The message is meant for the caller: it names the field or thing, its value, and the way out."""


class InvalidArgumentError(NearkinError, ValueError):
    """`field` is the path of the offending field in the request."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class NotFoundError(NearkinError):
    """No such run, generation or push."""


class AlreadyExistsError(NearkinError):
    """It is there already, and different from what was given."""


class FailedPreconditionError(NearkinError):
    """The thing is not in the state that the call needs."""


class DataLossError(NearkinError):
    """Bytes are damaged or gone."""


class LimitExceededError(NearkinError):
    """`limit` is the limit's name as `GetServerInfo` reports it."""

    def __init__(self, limit: str, reason: str) -> None:
        super().__init__(f"{limit}: {reason}")
        self.limit = limit
        self.reason = reason


class UnimplementedError(NearkinError):
    """This version of the service cannot do that."""


class UnavailableError(NearkinError):
    """The service is draining."""


class UnauthenticatedError(NearkinError):
    """No token, or none that is known here."""


class PermissionDeniedError(NearkinError):
    """The token is known and does not reach this far."""


class NotInTimeError(NearkinError):
    """What was waited for did not come before the call's deadline."""


def disk_is_full(error: BaseException) -> bool:
    """Whether the system says that there is no room, or none for this user."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def lacking(error: BaseException) -> LimitExceededError | None:
    """What of the machine's ran out, as a limit; None: it is something else that went wrong."""
    if disk_is_full(error):
        return LimitExceededError("min_free_disk_bytes", "the data directory's disk is full; make room")
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM or _said(error, "bad_alloc"):
        return LimitExceededError("memory", "the service has not enough memory for this")
    if number in (errno.EMFILE, errno.ENFILE):
        return LimitExceededError(
            "open_files",
            "the service has as many files and connections open as it may; close some, or "
            "raise its `ulimit -n`",
        )
    if _said(error, "can't start new thread"):
        return LimitExceededError("threads", "the service has as many threads as it may; try again later")
    return None


def is_denied(error: BaseException) -> bool:
    """Whether the system says that this user may not."""
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)


def is_momentary(error: BaseException) -> bool:
    """Whether what could not be read may well be sound: it was not let, or had nothing to read it with."""
    return is_denied(error) or lacking(error) is not None


def _said(error: BaseException, words: str) -> bool:
    """C++ and CPython have no class of their own for these."""
    return isinstance(error, RuntimeError) and words in str(error)
