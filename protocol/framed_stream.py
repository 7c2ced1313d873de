"""A Stream made of frames: what both transports share above the single frame.

A transport supplies a `FramePipe` that moves frames and knows when the other side is gone; this file adds
messages, END and ABORT, and the deadlines on silence. Used by `grpc_transport` and `memory_transport`.

Silence is judged by bytes that move. A frame that does not get through alarms after SUSPECT_AFTER_S and
ends the stream after ABORT_AFTER_S, unless its connection moves other streams' frames (a slow uplink
shared by many is not silent); then FRAME_S is the limit.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal.protocol.errors import (
    PeerSilent,
    ProtocolViolation,
    ShoalError,
    StreamBroken,
    StreamEnded,
    UsageError,
)
from shoal.protocol.framing import FrameDecoder, FrameEncoder, FrameKind, kind_of, last_words
from shoal.protocol.identity import VerifiedPeer
from shoal.protocol.limits import (
    ABORT_AFTER_S,
    FIRST_FRAME_BYTES,
    FRAME_BYTES,
    FRAME_S,
    LEAST_FRAME_BYTES,
    LINGER_S,
    SUSPECT_AFTER_S,
)
from shoal.protocol.transport import Buffer, Message, Stream

_LAST_WORDS_S = 1.0  # how long a failed sender waits for the other side's reason
_LAST_WORDS_FRAMES = 4  # and how many frames it keeps on the way to it
_QUICK_FRAME_S, _SLOW_FRAME_S = (
    0.05,
    0.5,
)  # far below SUSPECT_AFTER_S, even where several streams share a link
_LINGER_FRAMES = 16  # after END nobody reads: a handler that still streams is cut off


class FramePipe(ABC):
    """The frames of one stream, both ways. One reader and one writer at a time."""

    @abstractmethod
    async def write(self, frame: bytes) -> None:
        """Hand over one frame; waits for room. Raises StreamBroken. Cancelled: the pipe is unusable."""

    @abstractmethod
    async def read(self) -> bytes | None:
        """The next frame; None when the other side closed its direction. Raises StreamBroken."""

    @abstractmethod
    async def half_close(self) -> None:
        """Close this side's direction. Errors do not matter any more."""

    @abstractmethod
    def break_off(self) -> None:
        """Give up: waiting and later operations raise StreamBroken, and the other side's too, once told.

        Without effect on a stream that both sides finished.
        """


@dataclass(slots=True)
class Traffic:
    """Bytes of one method's frames."""

    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(slots=True, weakref_slot=True)
class Pulse:
    """How a connection moves: when it last did (loop time), and the frame size that suits it."""

    moved_s: float = 0.0
    frame_bytes: int = FIRST_FRAME_BYTES

    def moved(self) -> None:
        """A frame came in."""
        self.moved_s = asyncio.get_running_loop().time()

    def wrote(self, frame_bytes: int, since_s: float) -> None:
        """A frame went out that was handed over at `since_s`. Double the size where that was quick."""
        self.moved()
        if self.moved_s - since_s > _SLOW_FRAME_S:
            self.frame_bytes = max(LEAST_FRAME_BYTES, self.frame_bytes // 2)
        elif self.moved_s - since_s < _QUICK_FRAME_S and frame_bytes >= self.frame_bytes:
            self.frame_bytes = min(FRAME_BYTES, self.frame_bytes * 2)


class FramedStream(Stream):
    """Messages over a pipe. The transport that made it calls `abort`, `leave` and `release`."""

    def __init__(
        self,
        remote: VerifiedPeer,
        pipe: FramePipe,
        traffic: Traffic,
        pulse: Pulse,
        trouble: Callable[[ShoalError], None],
        *,
        opened_here: bool = False,
    ) -> None:
        self.remote = remote
        self._opened_here = opened_here
        self._pipe = pipe
        self._traffic = traffic
        self._pulse = pulse
        self._trouble = trouble
        self._encoder = FrameEncoder()
        self._decoder = FrameDecoder()
        self._reading: asyncio.Task[bytes | None] | None = None  # survives a cancelled receive
        self._receiving = False
        self._ahead: deque[bytes] = deque()  # frames read in search of the other side's reason
        self._over: ShoalError | None = None  # why nothing more can be received
        self._failure: ShoalError | None = None  # why the whole stream is unusable
        self._said_end = False

    async def send(self, header: object, payload: Buffer = b"") -> None:
        self._require_usable()
        if self._said_end:
            raise UsageError("this side has already said END; open another stream to send more")
        try:
            for frame in self._encoder.message(header, payload, lambda: self._pulse.frame_bytes):
                await self._write(frame)
        except asyncio.CancelledError:
            self._give_up(StreamBroken(f"a send to {self.remote.peer} was cancelled midway"))
            raise

    async def receive(self, *kinds: type[Any], max_payload_bytes: int = 0) -> Message[Any]:
        self._require_usable()
        if self._over is not None:
            raise self._over
        self._receiving = True
        try:
            self._decoder.admit(kinds, max_payload_bytes)
            while (message := self._decoder.feed(await self._next_frame())) is None:
                pass
            return message
        except ShoalError as over:
            self._over = over
            if isinstance(over, ProtocolViolation | StreamBroken) and not self._decoder.finished:
                self._trouble(over)
            raise
        finally:
            self._receiving = False

    async def end(self) -> None:
        if not self._said_end:
            self._require_usable()
            self._said_end = True
            await self._write(self._encoder.end())
            await self._pipe.half_close()

    async def abort(self, error: BaseException) -> None:
        """Tell the other side why this one gives up, if it still listens. Never raises."""
        if self._failure is None:
            with contextlib.suppress(StreamBroken, TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._pipe.write(self._encoder.abort(error))
                    await self._pipe.half_close()
                    return
        self._pipe.break_off()

    async def leave(self) -> None:
        """The opener's clean exit: say END, unless the other side was through first. Raises as `end` does."""
        if self._over is None and self._failure is None:
            try:
                await self.end()
            except StreamBroken:
                if not self._other_ended():
                    raise

    async def linger(self) -> None:
        """Let the other side finish after `leave`, discarding a little of what it sends."""
        if self._over is None and self._failure is None:
            with contextlib.suppress(TimeoutError, StreamBroken):
                async with asyncio.timeout(LINGER_S):
                    for _ in range(_LINGER_FRAMES):
                        if await self._read() is None:
                            return

    async def release(self) -> None:
        """Break off whatever is still open, at the very end."""
        self._pipe.break_off()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    def _require_usable(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _give_up(self, failure: ShoalError) -> None:
        if self._failure is None:
            self._failure = failure
            self._pipe.break_off()

    async def _write(self, frame: bytes) -> None:
        since_s = asyncio.get_running_loop().time()
        self._require_listener()
        try:
            with _Watchdog(self._pulse, self._suspect, self._silent):
                await self._pipe.write(frame)
        except StreamBroken as broken:
            raise await self._reason(broken) from broken
        self._pulse.wrote(len(frame), since_s)
        self._traffic.bytes_out += len(frame)

    async def _next_frame(self) -> bytes:
        if self._ahead:
            return self._ahead.popleft()
        try:
            if self._decoder.inside_message:
                with _Watchdog(self._pulse, self._suspect, self._silent):
                    frame = await self._read()
            else:
                frame = await self._read()
        except StreamBroken as broken:
            raise self._failure or broken from None
        if frame is None:
            raise StreamBroken(f"{self.remote.peer} stopped without END; what it sent is not complete")
        return frame

    async def _read(self) -> bytes | None:
        await asyncio.wait({self._start_reading()})
        reading, self._reading = self._start_reading(), None
        frame = reading.result()
        if frame is not None:
            self._pulse.moved()
            self._traffic.bytes_in += len(frame)
        return frame

    def _start_reading(self) -> asyncio.Task[bytes | None]:
        if self._reading is None:
            self._reading = asyncio.create_task(self._pipe.read(), name=f"read from {self.remote.peer}")
            self._reading.add_done_callback(_seen)
        return self._reading

    def _require_listener(self) -> None:
        """Before sending, see whether the handler is through: gRPC swallows what is sent to it then."""
        if not self._opened_here or not self._start_reading().done():
            return
        frame = self._next_unread()
        error = last_words(frame) if frame else None
        if error is not None:
            self._over = error
            raise error
        if self._other_ended():
            raise StreamBroken(f"{self.remote.peer} finished without taking all that was sent")

    def _next_unread(self) -> bytes | None:
        """The frame that came in and waits for `receive`, if there is one."""
        task = self._reading
        readable = task is not None and task.done() and not task.cancelled() and task.exception() is None
        return task.result() if task is not None and readable else None

    async def _reason(self, broken: StreamBroken) -> ShoalError:
        """Why a write failed. The other side may have said so before it closed: look for its ABORT."""
        if self._failure is not None:
            return self._failure
        if self._over is None and not self._receiving:
            with contextlib.suppress(StreamBroken, TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._look_ahead()
        if self._other_ended():
            return StreamBroken(f"{self.remote.peer} finished without taking all that was sent")
        if self._over is not None:
            return self._over
        self._failure = broken
        self._trouble(broken)
        return broken

    async def _look_ahead(self) -> None:
        while len(self._ahead) < _LAST_WORDS_FRAMES and (frame := await self._read()) is not None:
            self._ahead.append(frame)
            if (error := last_words(frame)) is not None:
                self._over = error
                return

    def _other_ended(self) -> bool:
        unread = (*self._ahead, self._next_unread() or b"")
        return isinstance(self._over, StreamEnded) or any(kind_of(f) is FrameKind.END for f in unread)

    def _suspect(self, silent_s: float) -> None:
        self._trouble(PeerSilent(f"{self.remote.peer} has moved no byte for {silent_s:.1f} s"))

    def _silent(self, silent_s: float) -> None:
        silence = PeerSilent(f"{self.remote.peer} moved no byte for {silent_s:.1f} s; the stream is given up")
        self._trouble(silence)
        self._give_up(silence)


def _seen(task: asyncio.Task[bytes | None]) -> None:
    """Nobody may ever ask for this frame or error; then it is no news."""
    if not task.cancelled():
        task.exception()


class _Watchdog:
    """Inside the context a frame should move: calls `suspect`, then `silent`, once each, if none does."""

    def __init__(
        self, pulse: Pulse, suspect: Callable[[float], None], silent: Callable[[float], None]
    ) -> None:
        self._pulse = pulse
        self._suspect: Callable[[float], None] | None = suspect
        self._silent = silent
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> None:
        self._since_s = self._loop.time()
        self._timer = self._loop.call_at(self._since_s + SUSPECT_AFTER_S, self._check)

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        now = self._loop.time()
        quiet_since_s = max(self._since_s, self._pulse.moved_s)
        abort_at_s = min(quiet_since_s + ABORT_AFTER_S, self._since_s + FRAME_S)
        suspect_at_s = min(quiet_since_s + SUSPECT_AFTER_S, abort_at_s)
        if now >= abort_at_s:
            self._silent(now - quiet_since_s)
            return
        if now >= suspect_at_s and self._suspect is not None:
            self._suspect(now - quiet_since_s)
            self._suspect = None
        next_s = suspect_at_s if now < suspect_at_s and self._suspect is not None else abort_at_s
        self._timer = self._loop.call_at(next_s, self._check)
