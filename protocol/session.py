"""The opening side of a transport: how a stream that this peer opened comes to its end.

Shared by both transports. Owns the streams that were left cleanly and whose remote handler still works.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from shoal.protocol.framed_stream import FramedStream
from shoal.protocol.transport import Stream


class Sessions:
    """The outgoing streams of one transport."""

    def __init__(self) -> None:
        self.count = 0  # open now, those not counted that only linger
        self._lingering: dict[asyncio.Task[None], None] = {}

    @asynccontextmanager
    async def run(self, stream: FramedStream, closed: Callable[[], None]) -> AsyncIterator[Stream]:
        """Hand out a stream. Left normally: END, and the remote may finish; by an exception: broken off.

        `closed` is called once, when nothing of the stream is left.
        """
        self.count += 1
        left = False
        try:
            yield stream
            await stream.leave()
            left = True
        finally:
            self.count -= 1
            if left:
                task = asyncio.create_task(self._linger(stream, closed), name="linger after END")
                self._lingering[task] = None
                task.add_done_callback(self._lingering.pop)
            else:
                await _drop(stream, closed)

    async def close(self) -> None:
        """Break off what lingers."""
        tasks = list(self._lingering)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _linger(self, stream: FramedStream, closed: Callable[[], None]) -> None:
        try:
            await stream.linger()
        finally:
            await _drop(stream, closed)


async def _drop(stream: FramedStream, closed: Callable[[], None]) -> None:
    closed()
    await stream.release()
