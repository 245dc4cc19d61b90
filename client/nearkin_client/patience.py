"""How long calls may take, and which are repeated."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import grpc

from nearkin_client.errors import (
    DeadlineExceeded,
    NearkinError,
    error_from_rpc,
    invalid,
    locked_out,
    silent,
    status_of,
    untrusted,
)

log = logging.getLogger("nearkin.client")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """Default deadlines, in seconds. Every call has one; `timeout=` of a method overrides it.

    Attributes:
        call: control calls and queries (nearest, runs, generations, compare, commit, ...).
        table: waiting for an epoch to be published, and reading its table.
        push: one rank's push: everything until the service has its rows.
        outage: within those deadlines, how long a service that cannot be reached is tried again
            before `Unavailable` is raised. Long enough for a restart.
    """

    call: float = 30.0
    table: float = 60.0
    push: float = 1800.0
    outage: float = 60.0

    def __post_init__(self) -> None:
        for each in fields(self):
            if not getattr(self, each.name) > 0:
                invalid(each.name, getattr(self, each.name), "is not a number of seconds greater than 0")


FOR_EVER = 365 * 86_400.0
"""Seconds. gRPC takes a moment that is too far away, such as infinity, for one that has passed."""


class Deadline:
    """A moment by which something has to be done: `FOR_EVER` from now at the latest."""

    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            invalid("timeout", seconds, "is not a number of seconds greater than 0")
        self.seconds = seconds
        self._end = time.monotonic() + min(seconds, FOR_EVER)

    @property
    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())


# A cut connection shows as any of these, depending on where the cut met the call. All of our repeatable
# calls are idempotent, so repeating one that did reach the service does no harm.
_INTERRUPTED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_TRANSPORT_WORDS = ("RST_STREAM", "Stream removed", "Socket closed", "GOAWAY", "Connection reset", "EOF")


def interrupted(error: grpc.RpcError) -> bool:
    """Whether the connection failed, rather than the call."""
    code, details = status_of(error)
    if code in _INTERRUPTED:
        return not (locked_out(error) or untrusted(error))
    return code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and any(
        word in details for word in _TRANSPORT_WORDS
    )


class Stalled(grpc.RpcError):
    """A connection that is up and moves nothing, found by ourselves; to its callers a lost connection."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def code(self) -> grpc.StatusCode:
        """As of a connection that broke."""
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        """What was noticed."""
        return f"nothing moved for {self._seconds:g} s"

    def trailing_metadata(self) -> tuple[()]:
        """Empty: the service did not say anything."""
        return ()


class Persistence:
    """Decides, attempt after attempt, whether to try again, and sleeps before it says yes."""

    FIRST_PAUSE = 0.05
    LONGEST_PAUSE = 2.0
    LONGEST_CONNECT = 10.0
    """An attempt that lasted longer had reached the service, whatever ended it."""

    def __init__(self, deadline: Deadline, outage: float) -> None:
        self._deadline = deadline
        self._outage = outage
        self._since: float | None = None
        self._attempts = 0
        self._began = time.monotonic()

    def waited(self) -> None:
        """Of an attempt that may wait for long without a word: if it did, there was no outage meanwhile."""
        if time.monotonic() - self._began > self.LONGEST_CONNECT:
            self.progressed()

    def progressed(self) -> None:
        """Something got through: the outage, if there was one, is over."""
        self._since = None
        self._attempts = 0

    def pause_or_raise(self, error: grpc.RpcError, doing: str) -> None:
        """Sleep before another attempt, or raise the error when it has been tried long enough."""
        now = time.monotonic()
        self._since = self._since or now
        longest = min(self.LONGEST_PAUSE, self.FIRST_PAUSE * 2.0**self._attempts)
        pause = longest * random.uniform(0.5, 1.0)  # noqa: S311 - spreads the ranks, keeps no secret
        trying = now - self._since
        if trying + pause > self._outage or pause >= self._deadline.remaining:
            failed = error_from_rpc(error)
            tried = f"the service cannot be reached (tried for {trying:.1f} s)"
            raise type(failed)(f"{doing}: {tried}: {failed.message}") from error
        if not self._attempts:
            log.info("%s: connection lost, trying again: %s", doing, error_from_rpc(error).message)
        self._attempts += 1
        time.sleep(pause)
        self._began = time.monotonic()


def repeat_until(operation: Callable[[float], T], deadline: Deadline, outage: float, doing: str) -> T:
    """Call `operation(seconds_left)` until it answers; only for operations that may safely be repeated."""
    persistence = Persistence(deadline, outage)
    while True:
        try:
            return operation(deadline.remaining)
        except grpc.RpcError as error:
            if not interrupted(error):
                raise meaning(error, doing, deadline) from error
            persistence.pause_or_raise(error, doing)


def once(operation: Callable[[float], T], deadline: Deadline, doing: str) -> T:
    """Call `operation(seconds_left)` a single time: repeating it might do harm or mislead."""
    try:
        return operation(deadline.remaining)
    except grpc.RpcError as error:
        raise meaning(error, doing, deadline) from error


def meaning(error: grpc.RpcError, doing: str, deadline: Deadline) -> NearkinError:
    """The error of a failed call, with what was asked for where the service says nothing itself."""
    if silent(error):
        return DeadlineExceeded(f"{doing}: the service did not answer within {deadline.seconds:g} s")
    return error_from_rpc(error)


def out_of_time(doing: str, deadline: Deadline) -> DeadlineExceeded:
    """The error for a deadline that passed between two calls."""
    return DeadlineExceeded(f"{doing}: not finished within {deadline.seconds:g} s")
