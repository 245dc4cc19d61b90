"""One connected service: its stubs, with deadline, credentials and repetition applied to every call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import grpc
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb
from nearkin.v1.neighbours_pb2_grpc import NeighbourServiceStub

from nearkin_client.channel import Endpoint
from nearkin_client.doors import elsewhere
from nearkin_client.errors import Cancelled, FailedPrecondition
from nearkin_client.lane import Lane, Sockets
from nearkin_client.memory import TableMemory
from nearkin_client.patience import Deadline, Patience, Stalled, once, repeat_until

Request_contra = TypeVar("Request_contra", contravariant=True)
Response_co = TypeVar("Response_co", covariant=True)
_SERVICE = "/nearkin.v1.NeighbourService/"


STALL_SECONDS = 30.0
"""A bulk stream that moves nothing for so long is taken for dead, and begun again on a new connection."""
CLOSE_SECONDS = 5.0
"""A connection that cannot be closed within this time, because its peer takes no bytes, is left to itself."""


class Unary(Protocol[Request_contra, Response_co]):
    """A unary method of a stub."""

    def __call__(
        self,
        request: Request_contra,
        /,
        *,
        timeout: float | None = None,
        metadata: tuple[tuple[str, str], ...] | None = None,
    ) -> Response_co: ...


class Stream(Protocol[Response_co]):
    """What a streaming call answers with."""

    def __iter__(self) -> Iterator[Response_co]: ...
    def __next__(self) -> Response_co: ...
    def cancel(self) -> object: ...


class Wire:
    """Safe to use from several threads. Control calls and bulk streams have connections of their own."""

    def __init__(self, endpoint: Endpoint, patience: Patience) -> None:
        self.endpoint = endpoint
        self.patience = patience
        self._metadata = endpoint.metadata()
        self._lock = threading.Lock()
        self._closed = False
        self._process = os.getpid()
        self._lane_sockets = Sockets()
        self.is_elsewhere = False
        """The service, as far as its last offer showed: who can do without its files asks no more."""
        self.memory = TableMemory()
        self._channel = endpoint.open_channel()
        self._bulk_channel: grpc.Channel | None = None
        self._stub = NeighbourServiceStub(self._channel)

    @property
    def stub(self) -> NeighbourServiceStub:
        """The generated stub, unless the client was closed."""
        self._require_ours()
        if self._closed:
            raise Cancelled("the client is closed")
        return self._stub

    def _require_ours(self) -> None:
        """FailedPrecondition: this is a forked child, in which nobody serves our connections."""
        if os.getpid() != self._process:
            raise FailedPrecondition(
                f"this client was made in process {self._process} and does not work in its forked child "
                f"{os.getpid()}: make one in each process, after forking"
            )

    def ask(
        self,
        method: Callable[[NeighbourServiceStub], Unary[Request_contra, Response_co]],
        request: Request_contra,
        *,
        doing: str,
        timeout: float | None = None,
        repeatable: bool = True,
    ) -> Response_co:
        """One unary call, repeated through outages if that is safe."""
        deadline = Deadline(timeout if timeout is not None else self.patience.call)

        def attempt(seconds: float) -> Response_co:
            return method(self.stub)(request, timeout=seconds, metadata=self._metadata)

        if repeatable:
            return repeat_until(attempt, deadline, self.patience.outage, doing)
        return once(attempt, deadline, doing)

    def lane(self, offer: pb.BulkLane) -> Lane:
        """The bulk lane that an answer of the service offers. NoLane: it is not for us."""
        lane = Lane(offer, self.endpoint, self._lane_sockets)
        self.is_elsewhere &= not lane.is_local
        return lane

    def elsewhere(self, offer: pb.BulkLane) -> str:
        """Why who offers this lane cannot be shown to be on this host; "" where it is, for certain."""
        why = elsewhere(offer, self.endpoint)
        self.is_elsewhere = bool(why)
        return why

    def write_rows(self, messages: Iterable[bulk.WriteRows], seconds: float) -> pb.WriteRowsResponse:
        """One WriteRows stream. Raises grpc.RpcError.

        gRPC's blocking form would wait for ever, deadline or not, for a dead peer to take a message.
        """
        channel, taken = self._bulk(), _Counted(messages)
        call: Any = channel.stream_unary(
            _SERVICE + "WriteRows",
            request_serializer=bulk.encode_write_rows,
            response_deserializer=pb.WriteRowsResponse.FromString,
        )
        pending = call.future(taken, timeout=seconds, metadata=self._metadata)
        try:
            while True:
                before = taken.count
                try:
                    response: pb.WriteRowsResponse = pending.result(timeout=STALL_SECONDS)
                except grpc.FutureTimeoutError:
                    if taken.count == before:
                        self._abandon(channel)
                        raise Stalled(STALL_SECONDS) from None
                else:
                    return response
        except BaseException:
            # Ctrl-C as well: gRPC's threads would go on with rows that are not ours any more.
            pending.cancel()
            raise

    def read_table(self, request: pb.ReadTableRequest, seconds: float) -> Stream[bytes]:
        """One ReadTable stream of messages that are not decoded. Raises grpc.RpcError while iterated."""
        call: Any = self._bulk().unary_stream(
            _SERVICE + "ReadTable", request_serializer=pb.ReadTableRequest.SerializeToString
        )
        stream: Stream[bytes] = call(request, timeout=seconds, metadata=self._metadata)
        return stream

    def watch(self, request: pb.WatchRunRequest, seconds: float | None) -> Stream[pb.RunEvent]:
        """One WatchRun stream. Raises grpc.RpcError while iterated."""
        return self.stub.WatchRun(request, timeout=seconds, metadata=self._metadata)

    def close(self) -> None:
        """End every call that is under way, but no call of the process we were forked from. Idempotent."""
        if os.getpid() != self._process:
            return
        self._lane_sockets.close()
        with self._lock:
            self._closed = True
            channels = [self._channel, *([self._bulk_channel] if self._bulk_channel else [])]
        for channel in channels:
            _close(channel, CLOSE_SECONDS)

    def _abandon(self, channel: grpc.Channel) -> None:
        """Give a dead connection up; the next bulk call opens another."""
        with self._lock:
            if self._bulk_channel is channel:
                self._bulk_channel = None
        _close(channel, 0)

    def _bulk(self) -> grpc.Channel:
        self._require_ours()
        with self._lock:
            if self._closed:
                raise Cancelled("the client is closed")
            if self._bulk_channel is None:
                self._bulk_channel = self.endpoint.open_channel()
            return self._bulk_channel


class _Counted(Iterator[bulk.WriteRows]):
    """Messages on their way, and how many gRPC has taken."""

    def __init__(self, messages: Iterable[bulk.WriteRows]) -> None:
        self._messages = iter(messages)
        self.count = 0

    def __next__(self) -> bulk.WriteRows:
        message = next(self._messages)
        self.count += 1
        return message


def _close(channel: grpc.Channel, seconds: float) -> None:
    """Close it; no longer than that, as gRPC waits for messages that a dead peer does not take."""
    closing = threading.Thread(target=channel.close, name="nearkin-close", daemon=True)
    closing.start()
    closing.join(seconds)
