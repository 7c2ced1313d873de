"""Frame pipes over gRPC calls: one gRPC message a frame. Used by the gRPC transport only.

gRPC cancels a whole call when an awaiting task is cancelled, and a server cannot cancel its own call;
both pipes therefore interrupt what waits on them by themselves when they are broken off.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from shoal.protocol.errors import StreamBroken
from shoal.protocol.framed_stream import FramePipe
from shoal.protocol.grpc_settings import grpc

T = TypeVar("T")
_DRAINED_FRAMES = 16


class _GrpcPipe(FramePipe):
    """What both ends share: operations of gRPC that `interrupt` can end."""

    def __init__(self, name: str) -> None:
        self.broken = False
        self._name = name
        self._waiting: dict[asyncio.Task[Any], bool] = {}  # task -> interrupted by us
        self._reading: asyncio.Task[bytes | None] | None = None  # survives a cancelled `read`

    @abstractmethod
    async def _read(self) -> bytes | None:
        """gRPC's own; cancelling it ends the call."""

    async def read(self) -> bytes | None:
        reading = self._start_reading()
        if not reading.done():
            done = asyncio.get_running_loop().create_future()
            settle = partial(_settle, done)
            reading.add_done_callback(settle)
            try:
                await done
            finally:
                reading.remove_done_callback(settle)
        return self.take()

    def peek(self) -> bytes | None:
        task = self._start_reading()
        if not task.done() or task.cancelled() or task.exception() is not None:
            return b""
        return task.result()

    def take(self) -> bytes | None:
        reading, self._reading = self._start_reading(), None
        return reading.result()

    async def release(self) -> None:
        self.break_off()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    def _start_reading(self) -> asyncio.Task[bytes | None]:
        if self._reading is None:
            self._reading = asyncio.create_task(self._read(), name=f"read from {self._name}")
            self._reading.add_done_callback(_seen)
        return self._reading

    def interrupt(self) -> None:
        """From now on every operation raises StreamBroken, those that wait too."""
        self.broken = True
        for task, interrupted in self._waiting.items():
            if not interrupted:
                self._waiting[task] = True
                task.cancel()

    async def _do(self, operation: Callable[[], Awaitable[T]]) -> T:
        if self.broken:
            raise self._broke("this side broke it off")
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a pipe is used by tasks only")
        cancelled_before = task.cancelling()
        self._waiting[task] = False
        try:
            return await operation()
        except asyncio.CancelledError:
            if self._waiting[task]:
                task.uncancel()
            if task.cancelling() <= cancelled_before:  # not this task: its call was cancelled
                raise self._broke("this side broke it off") from None
            raise
        except grpc.aio.AioRpcError as error:
            raise self._lost(error) from error
        except (grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            raise self._broke(str(error) or type(error).__name__) from error
        finally:
            del self._waiting[task]

    def _lost(self, error: grpc.aio.AioRpcError) -> StreamBroken:
        return self._broke(f"{error.code().name}: {error.details()}")

    def _broke(self, reason: str) -> StreamBroken:
        return StreamBroken(f"the stream {self._name} broke: {reason}")


class ClientPipe(_GrpcPipe):
    """The end of the peer that opened the stream. `lost` is called when the connection is gone."""

    def __init__(
        self, name: str, call: grpc.aio.StreamStreamCall[bytes, bytes], lost: Callable[[], None]
    ) -> None:
        super().__init__(name)
        self._call = call
        self._connection_lost = lost

    async def write(self, frame: bytes) -> None:
        await self._do(lambda: self._call.write(frame))

    async def _read(self) -> bytes | None:
        frame = await self._do(self._call.read)
        return frame if isinstance(frame, bytes) else None

    async def half_close(self) -> None:
        await self._do(self._call.done_writing)

    def break_off(self) -> None:
        if not self.broken and not self._call.done():
            self.interrupt()
            self._call.cancel()

    def _lost(self, error: grpc.aio.AioRpcError) -> StreamBroken:
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            self._connection_lost()
        return super()._lost(error)


class ServerPipe(_GrpcPipe):
    """The end of the peer that serves the stream. When it was broken off, the servicer aborts the call."""

    def __init__(self, name: str, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        super().__init__(name)
        self._context = context

    async def write(self, frame: bytes) -> None:
        await self._do(lambda: self._context.write(frame))

    async def _read(self) -> bytes | None:
        frame = await self._do(self._context.read)
        return frame if isinstance(frame, bytes) else None

    async def half_close(self) -> None:
        """Nothing to do: the call ends when the servicer returns."""

    async def drain(self, limit_s: float) -> None:
        """Wait for the caller's half-close, for a while: it has our END, and its own is on the way.

        Were the call over before the caller wrote its END, gRPC would fail that write, and with it the
        caller's reading of what we sent. A caller that goes on and on is left to that.
        """
        with contextlib.suppress(TimeoutError, StreamBroken):
            async with asyncio.timeout(limit_s):
                for _ in range(_DRAINED_FRAMES):
                    if await self.read() is None:
                        return

    def break_off(self) -> None:
        self.interrupt()


def _settle(done: asyncio.Future[None], task: asyncio.Task[bytes | None]) -> None:
    if not done.done():
        done.set_result(None)


def _seen(task: asyncio.Task[bytes | None]) -> None:
    """Nobody may ever ask for this frame or error; then it is no news."""
    if not task.cancelled():
        task.exception()
