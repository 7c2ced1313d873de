"""The frame pipe of the memory twin: two ends, each with a bounded inbox, joined by two routes.

Made in pairs by `memory_transport`. A writer may have WINDOW_BYTES under way that the other side has not
read; credits travel back like everything else, so a cut or a frozen reader stops it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial

from shoal.protocol.errors import StreamBroken
from shoal.protocol.framed_stream import FramePipe
from shoal.protocol.framing import FrameKind
from shoal.protocol.identity import PeerId
from shoal.protocol.limits import KIB, MIB
from shoal.protocol.memory_network import Network
from shoal.protocol.transport import Channel

WINDOW_BYTES = 1 * MIB  # sent and not yet read, one direction of one stream; gRPC starts with the same
BUFFERED_BYTES = 2 * KIB  # a frame up to this fits a socket's buffer: its writer goes on at once
CREDIT_BYTES = 16 * KIB  # as many read bytes share a credit
_NAMES = {int(kind): kind.name for kind in FrameKind}  # an enum finds its own name slowly


class _Bell:
    """Wakes the one who waits for it."""

    def __init__(self) -> None:
        self._waiting: asyncio.Future[None] | None = None

    def ring(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def wait(self) -> None:
        """Until it rings next. What it is about has to be looked at again."""
        self._waiting = asyncio.get_running_loop().create_future()
        await self._waiting


class MemoryPipe(FramePipe):
    """One end. `other` is the far end; only the network may touch it, when something has arrived."""

    other: MemoryPipe

    def __init__(
        self,
        network: Network,
        here: PeerId,
        there: PeerId,
        channel: Channel,
        method: str,
        moved: Callable[[], None],
    ) -> None:
        """`moved` is called for each piece of a large frame that has crossed."""
        self.here = here
        self.there = there
        self.broken: str | None = None
        self.on_broken: Callable[[], None] | None = None
        """Called when the other side gave up or was lost; not when this side breaks off."""
        self._network = network
        self._method = method
        self._moved = moved
        self._out = network.route(here, there, channel)
        self._inbox: deque[bytes] = deque()
        self._outstanding_bytes = 0
        self._leaving = False  # the last large frame: not all of it is on the wire yet
        self._serving = False
        self._no_more = False  # the other side closed its direction
        self._refused = False  # the other side is through and takes nothing more
        self._through = False  # so is this one, the serving side
        self._read_bytes = 0  # and not credited yet
        self._readable = _Bell()
        self._writable = _Bell()

    @classmethod
    def pair(
        cls,
        network: Network,
        here: PeerId,
        there: PeerId,
        channel: Channel,
        method: str,
        moved: Callable[[], None],
    ) -> MemoryPipe:
        """The near end of a new pipe."""
        near = cls(network, here, there, channel, method, moved)
        far = cls(network, there, here, channel, method, moved)
        near.other, far.other, far._serving = far, near, True
        return near

    async def write(self, frame: bytes) -> None:
        while self._is_full(len(frame)) and not self._refused:
            self._require_unbroken()
            await self._writable.wait()
        self._require_unbroken()
        if self._refused:
            raise StreamBroken(f"{self.there} has finished and takes nothing more")
        if self._network.tamper is not None:
            tampered = self._network.tamper(self.here, self.there, self._method, frame)
            if tampered is None:
                return
            frame = tampered
        self._outstanding_bytes += len(frame)
        pieces = self._network.pieces(self.here, self.there, self._method, frame)
        for size in pieces[:-1]:
            self._out.push(size, self._moved)
        left_s = self._out.push(pieces[-1], partial(self.other._arrive, frame))
        if len(frame) <= BUFFERED_BYTES:
            return
        loop = asyncio.get_running_loop()
        self._leaving = loop.time() < left_s
        if self._leaving:
            loop.call_at(left_s, self._left)
        while self._leaving:
            self._require_unbroken()
            await self._writable.wait()

    async def read(self) -> bytes | None:
        while not self._inbox and not self._no_more:
            self._require_unbroken()
            await self._readable.wait()
        self._require_unbroken()
        return self.take()

    def peek(self) -> bytes | None:
        if self.broken is not None:
            return b""
        return self._inbox[0] if self._inbox else None if self._no_more else b""

    def take(self) -> bytes | None:
        if not self._inbox:
            return None
        frame = self._inbox.popleft()
        self._read_bytes += len(frame)
        if self._read_bytes >= CREDIT_BYTES and not self._through:
            self._out.push(0, partial(self.other._credit, self._read_bytes))
            self._read_bytes = 0
        return frame

    async def half_close(self) -> None:
        """As in gRPC, the serving side closes by finishing: its handler may receive after its own END."""
        if not self._serving:
            self._out.push(0, partial(self.other._closed, False))

    def finish(self) -> None:
        """The serving side is through: nothing more is sent or taken."""
        self._through = True
        self._out.push(0, partial(self.other._closed, True))

    def break_off(self) -> None:
        if self.broken is None and not self._through:
            self.broken = "this side broke it off"
            self._stir()
            self._out.push(0, partial(self.other.fail, f"{self.here} broke it off"))

    async def release(self) -> None:
        """Nothing goes out any more: two ends that hold each other would stay until a collector comes."""
        self.break_off()
        del self.other

    def fail(self, reason: str) -> None:
        """The other side is gone."""
        if self.broken is None:
            self.broken = reason
            self._stir()
            if self.on_broken is not None:
                self.on_broken()

    def _arrive(self, frame: bytes) -> None:
        if self.broken is None:
            kind = _NAMES.get(frame[0], "?") if frame else "?"
            self._network.trace(f"{self.there} {self.here} {self._method} {kind} {len(frame)}")
            self._inbox.append(frame)
            self._readable.ring()

    def _left(self) -> None:
        self._leaving = False  # whatever the clock says: uvloop's timers fire up to half a millisecond early
        self._writable.ring()

    def _credit(self, size: int) -> None:
        self._outstanding_bytes -= size
        self._writable.ring()

    def _closed(self, refused: bool) -> None:
        self._no_more = True
        self._refused = self._through = refused
        self._stir()

    def _is_full(self, frame_bytes: int) -> bool:
        return (
            self._outstanding_bytes > 0
            and self._outstanding_bytes + frame_bytes > WINDOW_BYTES + CREDIT_BYTES
        )

    def _require_unbroken(self) -> None:
        if self.broken is not None:
            raise StreamBroken(f"the stream {self._method} with {self.there} broke: {self.broken}")

    def _stir(self) -> None:
        self._readable.ring()
        self._writable.ring()
