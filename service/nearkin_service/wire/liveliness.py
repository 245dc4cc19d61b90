"""Streams that go silent must not be held for ever: their callers may be gone without anyone's knowing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

from nearkin_service.errors import UnavailableError

T = TypeVar("T")


async def lively(messages: AsyncIterator[T], seconds: float) -> AsyncIterator[T]:
    """The messages. UnavailableError: none came for so long; what came before is stored."""
    while True:
        try:
            async with asyncio.timeout(seconds):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise UnavailableError(
                f"the stream sent nothing for {seconds:g} s and was ended (max_stream_idle_seconds); what it "
                "sent before is stored: ask GetPush and send the rest"
            ) from None
        yield message
