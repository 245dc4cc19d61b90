"""Every method of the protocol bound to its behaviour; requests and errors are treated alike for all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status  # type: ignore[import-untyped]
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb

from nearkin_service.errors import InvalidArgumentError, UnavailableError
from nearkin_service.wire import requests
from nearkin_service.wire.status import code_name, meaning

log = logging.getLogger("nearkin.wire")

_SERVICE = pb.DESCRIPTOR.services_by_name["NeighbourService"]
SERVICE_NAME = _SERVICE.full_name
Context = grpc.aio.ServicerContext[Any, Any]
CountError = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Refused:
    """What arrived in place of a request."""

    error: InvalidArgumentError


class _ReaderGoneError(Exception):
    """Whoever was being answered cannot be reached any more."""


def generic_handler(
    behaviours: Sequence[object],
    count_error: CountError,
    most_idle_seconds: float,
    admit: Callable[[], None],
) -> grpc.GenericRpcHandler:
    """Serves nearkin.v1.NeighbourService: each method is the one of that name in one of `behaviours`.

    `admit` raises for a call that comes too late to be begun.
    `count_error(method, code)` is told of every call that is refused. A reader that takes nothing for
    `most_idle_seconds` is given up.
    """
    guard = _Guard(count_error, most_idle_seconds, admit)
    handlers = {m.name: _bind(m, _find(m.name, behaviours), guard) for m in _SERVICE.methods}
    return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)


def _find(name: str, behaviours: Sequence[object]) -> Callable[..., Any]:
    (found,) = [getattr(each, name) for each in behaviours if hasattr(each, name)]
    behaviour: Callable[..., Any] = found
    return behaviour


def _bind(
    method: MethodDescriptor, behaviour: Callable[..., Any], guard: _Guard
) -> grpc.RpcMethodHandler[Any, Any]:
    read = _reader(method)
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(guard.streamed(method.name, behaviour), read, _serialise)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(guard.streaming(method.name, behaviour), read, _serialise)
    return grpc.unary_unary_rpc_method_handler(guard.unary(method.name, behaviour), read, _serialise)


def _reader(method: MethodDescriptor) -> Callable[[bytes], Any]:
    """A deserialiser that never raises: damaged requests must reach the code that can say so."""
    decode: Callable[[bytes], Any] = bulk.decode_write_rows
    if method.name != "WriteRows":
        decode = requests.reader(GetMessageClass(method.input_type))

    def read(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return Refused(InvalidArgumentError("request", f"not a {method.input_type.full_name} message"))
        except InvalidArgumentError as error:
            return Refused(error)

    return read


def _serialise(reply: Message | bytes) -> bytes:
    """Bulk and large replies come as bytes, made on another thread."""
    return reply if isinstance(reply, bytes) else reply.SerializeToString()


class _Guard:
    """Turns what behaviours raise into status codes."""

    def __init__(self, count_error: CountError, most_idle_seconds: float, admit: Callable[[], None]) -> None:
        self._admit = admit
        self._count_error = count_error
        self._most_idle_seconds = most_idle_seconds

    def unary(self, name: str, behaviour: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
        """What was asked for is done to its end: a caller who leaves leaves nothing half done."""

        async def call(request: Any, context: Context) -> Any:
            try:
                self._admit()
                work = asyncio.create_task(behaviour(_sound(request), context))
                try:
                    return await asyncio.shield(work)
                except asyncio.CancelledError:
                    work.add_done_callback(partial(_log_end, name))
                    raise
            except Exception as error:
                await self._refuse(name, error, context)

        return call

    def streamed(self, name: str, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(messages: AsyncIterator[Any], context: Context) -> Any:
            try:
                self._admit()
                return await behaviour((_sound(message) async for message in messages), context)
            except Exception as error:
                await self._refuse(name, error, context)

        return call

    def streaming(
        self, name: str, behaviour: Callable[..., AsyncGenerator[Any, None]]
    ) -> Callable[..., Awaitable[None]]:
        async def call(request: Any, context: Context) -> None:
            try:
                self._admit()
                async with aclosing(behaviour(_sound(request), context)) as replies:
                    async for reply in replies:
                        await self._write(_serialise(reply), context)
            except _ReaderGoneError as gone:
                log.debug("%s: its reader went away: %s", name, gone)
            except Exception as error:
                if not context.done():  # a reader that went away needs no answer
                    await self._refuse(name, error, context)

        return call

    async def _write(self, data: bytes, context: Context) -> None:
        """UnavailableError: the reader takes nothing. _ReaderGoneError: there is none any more."""
        try:
            async with asyncio.timeout(self._most_idle_seconds):
                await context.write(data)
        except TimeoutError:
            raise UnavailableError(
                f"nothing was taken of this answer for {self._most_idle_seconds:g} s "
                "(max_stream_idle_seconds): read it again"
            ) from None
        except Exception as error:  # gRPC's own, which it does not name
            raise _ReaderGoneError(str(error)) from error

    async def _refuse(self, name: str, error: Exception, context: Context) -> NoReturn:
        found = meaning(name, error)
        self._count_error(name, code_name(found))
        status = rpc_status.to_status(found)
        await context.abort(status.code, status.details, status.trailing_metadata)
        raise asyncio.CancelledError  # abort has raised already


def _log_end(name: str, work: asyncio.Task[Any]) -> None:
    """Whoever asked has left: a mistake of ours would go by without a word."""
    error = None if work.cancelled() else work.exception()
    if isinstance(error, Exception):
        meaning(name, error)


def _sound(request: Any) -> Any:
    if isinstance(request, Refused):
        raise request.error
    return request
