"""Server-sent events to a caller who may read slowly, not at all, or go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.types import Receive, Scope, Send

from shoal.node.gateway.errors import Refusal, refusal_of
from shoal.protocol.errors import ShoalError

UNREAD_S = 30.0  # that a caller may leave a full socket unread
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]


class EventStream:
    """An ASGI response. `close` is awaited in the end, however it ends."""

    def __init__(self, events: AsyncIterator[dict[str, Any]], close: Callable[[], Awaitable[None]]) -> None:
        self._events = events
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send), name="events")
        leaving = asyncio.create_task(_left(receive), name="caller leaves")
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._close()

    async def _send(self, send: Send) -> None:
        """Errors after the first byte have no status any more: they are an event, the last one."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        try:
            try:
                async for event in self._events:
                    await _write(send, json.dumps(event, ensure_ascii=False))
            except ShoalError as error:
                await _write(send, json.dumps(refusal_of(error).body))
            except Refusal as refusal:
                await _write(send, json.dumps(refusal.body))
            await _write(send, "[DONE]", last=True)
        except TimeoutError:
            return  # nobody reads; the server closes a response that was not finished


async def _write(send: Send, data: str, last: bool = False) -> None:
    async with asyncio.timeout(UNREAD_S):
        body = f"data: {data}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": not last})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
