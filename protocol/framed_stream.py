"""A Stream made of frames: what both transports share above the single frame.

A transport supplies a `FramePipe` that moves frames and knows when the other side is gone; this file adds
messages, END and ABORT, and the deadlines on silence. Used by `grpc_transport` and `memory_transport`.
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
from shoal.protocol.limits import LINGER_S
from shoal.protocol.progress import Pulse, Watchdog
from shoal.protocol.transport import Buffer, Message, Stream
from shoal.protocol.uplink import Outlet, Place

_LAST_WORDS_S = 1.0  # how long a failed sender waits for the other side's reason
_LAST_WORDS_FRAMES = 4  # and how many frames it keeps on the way to it
_LINGER_FRAMES = 16  # after END nobody reads: a handler that still streams is cut off


class FramePipe(ABC):
    """The frames of one stream, both ways. One reader and one writer at a time."""

    @abstractmethod
    async def write(self, frame: bytes) -> None:
        """Hand over one frame; waits for room. Raises StreamBroken. Cancelled: the pipe is unusable."""

    @abstractmethod
    async def read(self) -> bytes | None:
        """The next frame; None when the other side closed its direction. Raises StreamBroken.

        A cancelled read loses nothing.
        """

    @abstractmethod
    def peek(self) -> bytes | None:
        """What `read` would return at once; b"" while that is nothing."""

    @abstractmethod
    def take(self) -> bytes | None:
        """Return what `peek` has shown; the next `read` returns what follows."""

    @abstractmethod
    async def half_close(self) -> None:
        """Close this side's direction. Errors do not matter any more."""

    @abstractmethod
    def break_off(self) -> None:
        """Give up: waiting and later operations raise StreamBroken, and the other side's too, once told.

        Without effect on a stream that both sides finished.
        """

    async def release(self) -> None:
        """Break off whatever is still open, at the very end."""
        self.break_off()


@dataclass(slots=True)
class Traffic:
    """Bytes of one method's frames."""

    bytes_in: int = 0
    bytes_out: int = 0


class FramedStream(Stream):
    """Messages over a pipe. The transport that made it calls `abort`, `leave` and `release`."""

    def __init__(
        self,
        remote: VerifiedPeer,
        pipe: FramePipe,
        traffic: Traffic,
        pulse: Pulse,
        outlet: Outlet,
        trouble: Callable[[ShoalError], None],
        *,
        opened_here: bool = False,
    ) -> None:
        self.remote = remote
        self._opened_here = opened_here
        self._pipe = pipe
        self._traffic = traffic
        self._pulse = pulse
        self._outlet = outlet
        self._trouble = trouble
        self._loop = asyncio.get_running_loop()
        self._encoder = FrameEncoder()
        self._decoder = FrameDecoder()
        self._writing = Watchdog(pulse, self._suspect, self._silent)
        self._reading = Watchdog(pulse, self._suspect, self._silent)
        self._receiving = False
        self._looking = asyncio.Lock()  # held while a failed send looks ahead: `receive` may begin meanwhile
        self._ahead: deque[bytes] = deque()  # frames read in search of the other side's reason
        self._over: ShoalError | None = None  # why nothing more can be received
        self._failure: ShoalError | None = None  # why the whole stream is unusable
        self._said_end = False

    async def send(self, header: object, payload: Buffer = b"") -> None:
        self._require_usable()
        if self._said_end:
            raise UsageError("this side has already said END; open another stream to send more")
        place = Place.WHOLE if memoryview(payload).nbytes <= self._frame_bytes() else Place.OPENING
        try:
            for frame in self._encoder.message(header, payload, self._frame_bytes):
                await self._outlet.turn(len(frame), place)
                place, went_out = Place.INSIDE, False
                try:
                    await self._write(frame)
                    went_out = True
                finally:
                    self._outlet.over(len(frame), went_out)
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
        """The opener's clean exit: say END; that the other side was through first is no error."""
        if self._is_whole():
            try:
                await self.end()
            except StreamBroken:
                if not self._other_ended():
                    raise

    async def linger(self) -> None:
        """Let the other side finish after `leave`, discarding a little of what it sends."""
        if self._is_whole():
            with contextlib.suppress(TimeoutError, StreamBroken):
                async with asyncio.timeout(LINGER_S):
                    for _ in range(_LINGER_FRAMES):
                        if await self._read() is None:
                            return

    async def release(self) -> None:
        """Break off whatever is still open, at the very end."""
        self._writing.cancel()
        self._reading.cancel()
        await self._pipe.release()
        if isinstance(self._over, StreamEnded):
            self._over.__traceback__ = None  # its frames hold this stream: a cycle for each that ends well

    def _require_usable(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _give_up(self, failure: ShoalError) -> None:
        if self._failure is None:
            self._failure = failure
            self._pipe.break_off()

    def _frame_bytes(self) -> int:
        return min(self._pulse.frame_bytes, self._outlet.frame_bytes)

    async def _write(self, frame: bytes) -> None:
        since_s = self._loop.time()
        self._require_listener()
        try:
            with self._writing:
                await self._pipe.write(frame)
        except StreamBroken as broken:
            raise await self._reason(broken) from broken
        self._pulse.wrote(len(frame), since_s, self._loop.time())
        self._traffic.bytes_out += len(frame)

    async def _next_frame(self) -> bytes:
        if self._ahead:
            return self._ahead.popleft()
        try:
            if self._looking.locked():
                async with self._looking:
                    if self._ahead:
                        return self._ahead.popleft()
            if self._decoder.inside_message:
                with self._reading:
                    frame = await self._read()
            else:
                frame = await self._read()
        except StreamBroken as broken:
            raise self._failure or broken from None
        if frame is None:
            raise StreamBroken(f"{self.remote.peer} stopped without END; what it sent is not complete")
        return frame

    async def _read(self) -> bytes | None:
        frame = await self._pipe.read()
        if frame is not None:
            self._pulse.moved_s = self._loop.time()
            self._traffic.bytes_in += len(frame)
        return frame

    def _require_listener(self) -> None:
        """Before sending, see whether the handler has given up: a transport may take frames long after that.

        An END alone says nothing, since a handler may say END and go on receiving. What is read here stays
        for `receive`; with gRPC, what was not read when a write fails cannot be read any more.
        """
        if not self._opened_here or self._receiving:
            return
        while (frame := self._pipe.peek()) != b"":
            if frame is None:
                raise self._stopped()
            if (error := last_words(frame)) is not None:
                self._over = error
                raise error
            if kind_of(frame) is not FrameKind.END:
                return
            self._ahead.append(frame)
            self._pipe.take()

    def _stopped(self) -> StreamBroken:
        """The error of a sender whose listener has gone."""
        if self._other_ended():
            return StreamBroken(f"{self.remote.peer} finished without taking all that was sent")
        return StreamBroken(f"{self.remote.peer} stopped without END")

    async def _reason(self, broken: StreamBroken) -> ShoalError:
        """Why a write failed. The other side may have said so before it closed: look for its ABORT."""
        if self._failure is not None:
            return self._failure
        if self._over is None and not self._receiving:
            with contextlib.suppress(StreamBroken, TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._look_ahead()
        if self._other_ended():
            return self._stopped()
        if self._over is not None:
            return self._over
        self._failure = broken
        self._trouble(broken)
        return broken

    async def _look_ahead(self) -> None:
        async with self._looking:
            while len(self._ahead) < _LAST_WORDS_FRAMES and (frame := await self._read()) is not None:
                self._ahead.append(frame)
                if (error := last_words(frame)) is not None:
                    self._over = error
                    return

    def _other_ended(self) -> bool:
        """Whether the other side said END, be it received or not."""
        return isinstance(self._over, StreamEnded) or any(kind_of(f) is FrameKind.END for f in self._ahead)

    def _is_whole(self) -> bool:
        """Whether nothing has gone wrong so far."""
        return self._failure is None and (self._over is None or isinstance(self._over, StreamEnded))

    def _suspect(self, silent_s: float) -> None:
        self._trouble(PeerSilent(f"{self.remote.peer} has moved no byte for {silent_s:.1f} s"))

    def _silent(self, silent_s: float) -> None:
        silence = PeerSilent(f"{self.remote.peer} moved no byte for {silent_s:.1f} s; the stream is given up")
        self._trouble(silence)
        self._give_up(silence)
