"""The gate before every call: who calls, and whether they may.

token shown          its scope and runs decide, wherever it is shown; a wrong one is refused
none, unix socket    may everything: who can open the socket (mode 0600) owns the data anyway
none, tokens in force   UNAUTHENTICATED
none, no tokens      may everything: the address is loopback, asks for client certificates, or --insecure
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from nearkin_service.access import reach
from nearkin_service.access.policy import OPEN, SCOPES, Scope
from nearkin_service.access.tokens import TokenBook, TokenRecord
from nearkin_service.errors import NearkinError, PermissionDeniedError, UnauthenticatedError

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]

Refuse = Callable[[str, NearkinError, Any], Awaitable[Any]]
RunOfPush = Callable[[str], str | None]

_SCHEME = "bearer "
_MOST_RUNS_SHOWN = 3


class Gate(grpc.aio.ServerInterceptor):
    """Stands before every method of every service; what it does not know it refuses."""

    def __init__(
        self, book: TokenBook, run_of_push: RunOfPush, refuse: Refuse, *, unix_needs_token: bool = False
    ) -> None:
        """`refuse(method, error, context)` ends a call. `run_of_push`: None for an unknown push id."""
        self._book = book
        self._run_of_push = run_of_push
        self._refuse = refuse
        self._unix_needs_token = unix_needs_token

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(details)
        return None if handler is None else _Guarded(self, details.method, handler).handler()

    def caller(self, method: str, context: Any) -> TokenRecord | None:
        """The token that this call shows, if it may call the method at all; None for one who may everything.

        UnauthenticatedError, PermissionDeniedError: it may not.
        """
        token = _shown(context)
        if method in OPEN and token is None:
            return None
        needed = SCOPES.get(method, None if method not in OPEN else Scope.READ)
        if needed is None:
            raise PermissionDeniedError(f"{method} is not open to anyone")
        if token is None:
            self._require_none_needed(context)
            return None
        record = self._book.find(token)
        if record is None:
            raise UnauthenticatedError("the token is not known here; it may have been revoked")
        if record.level < needed:
            raise PermissionDeniedError(
                f"token {record.token_id} has scope {record.scope!r}; this needs {needed.label!r}"
            )
        return record

    def _require_none_needed(self, context: Any) -> None:
        if context.peer().startswith("unix") and not self._unix_needs_token:
            return
        if self._book.in_force:
            raise UnauthenticatedError(
                "this service needs a token: send it as metadata `authorization: Bearer TOKEN` (clients: "
                "token= or NEARKIN_TOKEN)"
            )

    def require_run(self, caller: TokenRecord, request: Any) -> None:
        """PermissionDeniedError: the request is about a run that the token does not reach."""
        run = getattr(request, "run", None) or self._run_of_push(getattr(request, "push_id", ""))
        if run and not caller.reaches(run):
            raise self._out_of_reach(caller)

    @staticmethod
    def _out_of_reach(caller: TokenRecord) -> PermissionDeniedError:
        shown = ", ".join(caller.runs[:_MOST_RUNS_SHOWN])
        return PermissionDeniedError(f"token {caller.token_id} reaches {shown}; not the run asked for")

    def require_health(self, caller: TokenRecord | None, request: Any, context: Any) -> None:
        """The state of one run is for its readers. It is refused like a name that nobody knows."""
        _, slash, run = getattr(request, "service", "").partition("/")
        if not slash:
            return
        if caller is None:
            self._require_none_needed(context)
        elif not caller.reaches(run):
            raise self._out_of_reach(caller)

    async def refuse(self, method: str, error: NearkinError, context: Any) -> None:
        await self._refuse(method.rpartition("/")[2], error, context)


class _Guarded:
    """One method behind the gate."""

    def __init__(self, gate: Gate, method: str, inner: Handler) -> None:
        self._gate = gate
        self._method = method
        self._inner = inner

    def handler(self) -> Handler:
        """The same kind of handler as the one inside."""
        inner: Any = self._inner
        codec = (inner.request_deserializer, inner.response_serializer)
        if inner.request_streaming and inner.response_streaming:
            return grpc.stream_stream_rpc_method_handler(self._replies(inner.stream_stream), *codec)
        if inner.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._reply(inner.stream_unary), *codec)
        if inner.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._replies(inner.unary_stream), *codec)
        return grpc.unary_unary_rpc_method_handler(self._reply(inner.unary_unary), *codec)

    def _reply(self, behaviour: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Any) -> Any:
            caller, request = await self._admitted(request, context)
            if caller is not None:
                reach.limit_to(caller.runs)
            return await behaviour(request, context)

        return call

    def _replies(self, behaviour: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
        async def call(request: Any, context: Any) -> None:
            _, request = await self._admitted(request, context)
            replies = behaviour(request, context)
            if not hasattr(replies, "__aiter__"):
                await replies  # it writes them itself
                return
            async for reply in replies:
                await context.write(reply)

        return call

    async def _admitted(self, request: Any, context: Any) -> tuple[TokenRecord | None, Any]:
        """The caller and the request, if it may be made. A stream is looked at message by message."""
        try:
            caller = self._gate.caller(self._method, context)
            if self._method in OPEN:
                self._gate.require_health(caller, request, context)
            if caller is None or not caller.runs:
                return caller, request
            if hasattr(request, "__aiter__"):
                return caller, self._checked(request, caller)
            self._gate.require_run(caller, request)
        except NearkinError as error:
            await self._gate.refuse(self._method, error, context)
        return caller, request

    async def _checked(self, messages: AsyncIterator[Any], caller: TokenRecord) -> AsyncIterator[Any]:
        """The method itself tells the caller of the error that a message ends in: none tells it twice."""
        async for message in messages:
            self._gate.require_run(caller, message)
            yield message


def _shown(context: Any) -> str | None:
    """The token that the call shows. "" for an authorization that is no bearer token: never a known one."""
    for key, value in context.invocation_metadata() or ():
        if key == "authorization":
            text = value if isinstance(value, str) else ""
            return text[len(_SCHEME) :].strip() if text.lower().startswith(_SCHEME) else ""
    return None
