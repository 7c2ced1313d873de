"""Line: the control stream between a leader and one member of its round, on which silence is noticed.

Sends Tick whenever nothing else was sent for a while, and raises PeerSilent when nothing came for a while: a
stopped process keeps its connections open, so only its silence tells. A process that stood still itself hears
first what came meanwhile: who does not listen must not blame others for silence. `loopback` joins a leader
to its own member in the same process.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from shoal.protocol.errors import PeerSilent, ShoalError, StreamBroken
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Buffer, Message, Stream
from shoal.training.outer.change import Change
from shoal.training.outer.messages import Tick

LEADER_SILENCE_S = 1.0  # then members look for another leader (design section 9)
MEMBER_SILENCE_S = 2.0  # then the leader goes on without the member (limits.SUSPECT_AFTER_S)
TICK_S = LEADER_SILENCE_S / 4
MEMBER_TICK_S = MEMBER_SILENCE_S / 4  # what members send all goes to one peer
OUTBOX = 2048  # messages: a GONE for each seat of a roster fits twice


class Line(ABC):
    """Posts messages without waiting, receives with a limit on silence."""

    peer: PeerId

    @abstractmethod
    def post(self, header: object, payload: Buffer = b"") -> None:
        """Send soon, in order. Raises PeerSilent when the other side has long taken nothing."""

    @abstractmethod
    async def receive(self, *kinds: type[Any], max_payload_bytes: int = 0) -> Message[Any]:
        """The next message that is no Tick. Raises PeerSilent, and what Stream.receive raises."""


class _Lifeline(Line):
    def __init__(self, stream: Stream, silence_s: float, tick_s: float) -> None:
        self.peer = stream.remote.peer
        self._stream = stream
        self._silence_s = silence_s
        self._tick_s = tick_s
        self._limit: asyncio.Timeout | None = None  # while somebody listens ...
        self._limit_s = 0.0  # ... until when it may be silent
        self._timer: asyncio.TimerHandle | None = None  # outlives one message: most lines are never silent
        self._outbox: deque[tuple[object, Buffer] | None] = deque()
        self._posted = Change()

    def post(self, header: object, payload: Buffer = b"") -> None:
        if len(self._outbox) >= OUTBOX:
            raise PeerSilent(f"{self.peer} takes no messages: {OUTBOX} wait")
        self._outbox.append((header, payload))
        self._posted.notify()

    def close(self) -> None:
        """What was posted is the last; `send_all` returns when it is sent."""
        self._outbox.append(None)
        self._posted.notify()

    def release(self) -> None:
        """Nobody is told of silence any more."""
        if self._timer is not None:
            self._timer.cancel()

    async def receive(self, *kinds: type[Any], max_payload_bytes: int = 0) -> Message[Any]:
        while True:
            limit = asyncio.timeout(None)
            try:
                async with limit:
                    self._listen(limit)
                    message = await self._stream.receive(*kinds, Tick, max_payload_bytes=max_payload_bytes)
            except TimeoutError:
                raise PeerSilent(f"nothing from {self.peer} for {self._silence_s:g} s") from None
            finally:
                self._limit = None
            if not isinstance(message.header, Tick):
                return message

    def _listen(self, limit: asyncio.Timeout) -> None:
        """Let the limit pass after a silence."""
        loop = asyncio.get_running_loop()
        self._limit, self._limit_s = limit, loop.time() + self._silence_s
        if self._timer is None:
            self._timer = loop.call_at(self._limit_s, self._judge)

    def _judge(self) -> None:
        self._timer, loop = None, asyncio.get_running_loop()
        if self._limit is None:
            return
        late_s = loop.time() - self._limit_s
        if late_s < 0.0:  # something came since
            self._timer = loop.call_at(self._limit_s, self._judge)
        elif late_s < TICK_S:
            self._limit.reschedule(loop.time())
        else:  # it was this process that stood still
            self._listen(self._limit)

    async def send_all(self) -> None:
        """Until the outbox is closed. A broken stream ends it quietly: the receiving side reports it."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                if not self._outbox:
                    await self._posted.wait(loop.time() + self._tick_s)
                item = self._outbox.popleft() if self._outbox else (Tick(), b"")
                if item is None:
                    return
                await self._stream.send(*item)
        except ShoalError:
            return


@asynccontextmanager
async def lifeline(stream: Stream, silence_s: float, tick_s: float = TICK_S) -> AsyncIterator[Line]:
    """A line that ticks inside the context; what was posted is sent before it ends in order."""
    line = _Lifeline(stream, silence_s, tick_s)
    sender = asyncio.create_task(line.send_all())
    try:
        yield line
        async with asyncio.timeout(silence_s):
            line.close()
            await sender
    except TimeoutError:
        raise PeerSilent(f"{line.peer} takes no messages") from None
    finally:
        line.release()
        if not sender.done():
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)


class _Loopback(Line):
    def __init__(self, peer: PeerId) -> None:
        self.peer = peer
        self.inbox: asyncio.Queue[Message[Any]] = asyncio.Queue(OUTBOX)
        self.other: _Loopback = self

    def post(self, header: object, payload: Buffer = b"") -> None:
        self.other.inbox.put_nowait(Message(header, memoryview(payload)))

    async def receive(self, *kinds: type[Any], max_payload_bytes: int = 0) -> Message[Any]:
        message = await self.inbox.get()
        if not isinstance(message.header, kinds):
            raise StreamBroken(f"{type(message.header).__name__} out of order in this process")
        return message


def loopback(me: PeerId) -> tuple[Line, Line]:
    """Both ends of a line within this process."""
    one, other = _Loopback(me), _Loopback(me)
    one.other, other.other = other, one
    return one, other
