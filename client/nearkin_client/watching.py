"""The events of a run, through lost connections."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
from nearkin.v1 import neighbours_pb2 as pb

from nearkin_client import decoding
from nearkin_client.errors import NearkinError, error_from_rpc, status_of
from nearkin_client.patience import FOR_EVER, Deadline, Persistence, interrupted
from nearkin_client.values import RunEvent
from nearkin_client.wire import Stream, Wire


def watch(wire: Wire, run: str, timeout: float | None) -> Iterator[RunEvent]:
    """Events as they come, from now on; after a lost connection a new `RunSnapshot` comes first."""
    deadline = Deadline(timeout if timeout is not None else FOR_EVER)
    request = pb.WatchRunRequest(run=run)
    return _events(wire, request, deadline, wire.watch(request, deadline.remaining))


def _events(
    wire: Wire, request: pb.WatchRunRequest, deadline: Deadline, stream: Stream[pb.RunEvent]
) -> Iterator[RunEvent]:
    persistence, reached = Persistence(deadline, wire.patience.outage), False
    while True:
        try:
            for message in stream:
                reached = True
                persistence.progressed()
                event = decoding.event(message)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            if status_of(error)[0] is grpc.StatusCode.DEADLINE_EXCEEDED:
                return
            if not interrupted(error):
                raise error_from_rpc(error) from error
            persistence.waited()
            try:
                persistence.pause_or_raise(error, f"watching run {request.run!r}")
            except NearkinError:
                if not reached or deadline.remaining > persistence.LONGEST_PAUSE:
                    raise
                time.sleep(deadline.remaining)  # it ends while the service is away, as it would otherwise
                return
        else:
            return
        finally:
            _end(stream)
        stream = wire.watch(request, deadline.remaining)


def _end(stream: Stream[pb.RunEvent]) -> None:
    """An application that traces its channels turns streams into generators, which are closed."""
    end = getattr(stream, "cancel", None) or getattr(stream, "close")  # noqa: B009
    end()
