"""The uplink of one peer: what it sends in bulk is held to the volunteer's limit, and measured.

Each transport has one `Uplink` and gives every stream an `Outlet` of it; `framed_stream` passes each frame of
a message through its outlet. Control frames never wait here. What they take is paid by bulk, up to half of
the limit, so that the limit is about everything a peer sends. Who opens a stream says which it is; of the
answers, who serves the method (`Transport.serve`): a caller cannot have a download for control. END, ABORT
and handshakes are not counted, nor is what TLS, TCP and IP add (about 3 %). Time is the loop's, virtual or
real.

*Limit.* A token bucket in the form of the GCRA's virtual schedule (ITU-T I.371): a frame may go when the
frames before it are paid for, and at most BURST_S of unused time is kept, so that a late timer loses nothing.
No ten seconds then carry more than the limit plus 5 %. Streams take turns frame by frame. A receiver inside a
message suspects the sender after SUSPECT_AFTER_S of silence; hence frames are short, and no further message
of several frames begins while frames inside others wait longer than PATIENCE_S.

*Measure.* As BBR does for a path (Cardwell et al., ACM Queue 14(5), 2016): the best delivery rate seen, over
samples in which something always waited to be sent. A sample is WINDOW_S of loop time: the bytes of bulk
frames that connections took, divided by the seconds in which at least one frame waited for its turn or its
connection. It counts if that was BUSY_S at least, or more bytes than sockets can swallow unsent. A better
sample replaces the estimate, a worse one pulls it down by DECAY of the difference: the link may have become
slower, or just its receivers. Time without progress beyond SUSPECT_AFTER_S is a receiver's fault and not
counted, and time with nothing to send says nothing.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from dataclasses import dataclass

from shoal.protocol.errors import UsageError
from shoal.protocol.limits import (
    FRAME_BYTES,
    LEAST_FRAME_BYTES,
    LEAST_UPLOAD_BYTES_PER_S,
    MIB,
    SUSPECT_AFTER_S,
)
from shoal.protocol.transport import Channel

BURST_S = 0.05  # the loop is never late by more (design section 4)
PATIENCE_S = 0.5
WINDOW_S = 10.0
BUSY_S = 1.0
SWALLOWED_BYTES = 64 * MIB  # by the send buffers of 16 connections; Linux lets each grow to 4 MiB
DECAY = 0.1
_FRAME_S = 0.02  # what a frame takes of the limit, if that gives at least LEAST_FRAME_BYTES
_EARLY_S = 0.001  # loops round their timers; the schedule itself does not move


def require_upload(limit_bytes_per_s: float | None) -> None:
    """Raises UsageError for a limit under LEAST_UPLOAD_BYTES_PER_S."""
    if limit_bytes_per_s is not None and limit_bytes_per_s < LEAST_UPLOAD_BYTES_PER_S:
        raise UsageError(
            f"an upload limit of {limit_bytes_per_s * 8 / 1e3:g} kbit/s is too low: the smallest frame would "
            f"take so long that others hold this peer for dead\n"
            f"give at least --upload {LEAST_UPLOAD_BYTES_PER_S * 8 / 1e3:g}kbit"
        )


class Place(enum.Enum):
    """Of a frame in its message."""

    WHOLE = "whole"  # the message's only frame
    OPENING = "opening"  # the first of several
    INSIDE = "inside"  # a further one: the receiver waits for it


class Outlet:
    """One stream's way out. This one leads nowhere outside: for what a peer says to itself."""

    frame_bytes = FRAME_BYTES  # most payload of one frame

    async def turn(self, frame_bytes: int, place: Place) -> None:
        """Returns when a frame may be handed to the connection; `over` follows, unless this is cancelled."""

    def over(self, frame_bytes: int, went_out: bool) -> None:
        """The connection has taken the frame, or it never will."""


class Uplink:
    """See the module. `limit_bytes_per_s`: what the volunteer allows, None for all there is."""

    def __init__(self, limit_bytes_per_s: float | None = None) -> None:
        """Raises UsageError for a limit under LEAST_UPLOAD_BYTES_PER_S."""
        self.limit_bytes_per_s = limit_bytes_per_s
        self.meter = Meter()
        self.pacer = None if limit_bytes_per_s is None else Pacer(limit_bytes_per_s)

    def outlet(self, channel: Channel, *, to_itself: bool = False) -> Outlet:
        """For one stream on a channel; `to_itself`: nothing of it leaves this machine."""
        if to_itself:
            return Outlet()
        return _BulkOutlet(self) if channel is Channel.BULK else _ControlOutlet(self)

    def bytes_per_s(self) -> float | None:
        """What the uplink carries in bulk as far as it was measured, at most the limit; None: not yet."""
        measured = self.meter.bytes_per_s()
        if measured is None or self.limit_bytes_per_s is None:
            return measured
        return min(measured, self.limit_bytes_per_s)


class _ControlOutlet(Outlet):
    def __init__(self, uplink: Uplink) -> None:
        self._pacer = uplink.pacer

    def over(self, frame_bytes: int, went_out: bool) -> None:
        if went_out and self._pacer is not None:
            self._pacer.spent_on_control(frame_bytes)


class _BulkOutlet(Outlet):
    def __init__(self, uplink: Uplink) -> None:
        self._pacer = uplink.pacer
        self._meter = uplink.meter
        if self._pacer is not None:
            self.frame_bytes = self._pacer.frame_bytes

    async def turn(self, frame_bytes: int, place: Place) -> None:
        self._meter.begin()
        if self._pacer is not None:
            try:
                await self._pacer.turn(frame_bytes, place)
            except BaseException:
                self._meter.end()
                raise

    def over(self, frame_bytes: int, went_out: bool) -> None:
        if went_out:
            self._meter.sent(frame_bytes)
        self._meter.end()


@dataclass(slots=True, eq=False)
class _Waiting:
    turn: asyncio.Future[None]
    since_s: float
    frame_bytes: int


class Pacer:
    """Gives bulk frames their turns, in all `bytes_per_s`."""

    def __init__(self, bytes_per_s: float) -> None:
        require_upload(bytes_per_s)
        self.frame_bytes = max(LEAST_FRAME_BYTES, min(FRAME_BYTES, int(bytes_per_s * _FRAME_S)))
        self._bytes_per_s = bytes_per_s
        self._waiting: dict[Place, deque[_Waiting]] = {place: deque() for place in Place}
        self._inside_was_last = False
        self._free_s = 0.0  # when everything so far is paid for (loop time)
        self._control_bytes = 0.0  # sent and not paid for yet
        self._timer: asyncio.TimerHandle | None = None

    async def turn(self, frame_bytes: int, place: Place) -> None:
        """Returns when the frame may go. A cancelled wait costs nothing."""
        loop = asyncio.get_running_loop()
        frame = _Waiting(loop.create_future(), loop.time(), frame_bytes)
        self._waiting[place].append(frame)
        self._serve()
        await frame.turn

    def spent_on_control(self, frame_bytes: int) -> None:
        """A frame went ahead of all; the bulk frames to come pay for it, each at most its own price."""
        self._control_bytes = min(self._control_bytes + frame_bytes, self._bytes_per_s)

    def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._free_s <= now + _EARLY_S and (frame := self._next(now)) is not None:
            extra_bytes = min(self._control_bytes, frame.frame_bytes)
            self._control_bytes -= extra_bytes
            paid_s = (frame.frame_bytes + extra_bytes) / self._bytes_per_s
            self._free_s = max(self._free_s, now - BURST_S) + paid_s
            frame.turn.set_result(None)
        if self._timer is None and any(self._waiting.values()):
            self._timer = loop.call_at(self._free_s, self._due)

    def _due(self) -> None:
        self._timer = None
        self._serve()

    def _next(self, now: float) -> _Waiting | None:
        """Who waited longest; but if a frame inside a message waits too long, nothing opens another message,
        and of two turns one goes to a frame inside."""
        for queue in self._waiting.values():
            while queue and queue[0].turn.done():  # cancelled
                queue.popleft()
        inside = self._waiting[Place.INSIDE]
        overdue = bool(inside) and now - inside[0].since_s > PATIENCE_S
        places = [Place.INSIDE, Place.WHOLE, Place.OPENING]
        if overdue:
            places = places[:2] if self._inside_was_last else places[:1]
        ready = [place for place in places if self._waiting[place]]
        if not ready:
            return None
        place = min(ready, key=lambda place: self._waiting[place][0].since_s)
        self._inside_was_last = place is Place.INSIDE
        return self._waiting[place].popleft()


class Meter:
    """The best rate at which bulk frames really went out."""

    def __init__(self) -> None:
        self._best_bytes_per_s: float | None = None
        self._pending = 0  # frames that wait or are being written
        self._progress_s = 0.0  # when a frame went out, or the first began to wait
        self._window_s = 0.0  # when the present sample began
        self._busy_s = 0.0
        self._bytes = 0

    def begin(self) -> None:
        """A frame is there to be sent."""
        if not self._pending:
            self._progress_s = asyncio.get_running_loop().time()
        self._pending += 1

    def end(self) -> None:
        """It went out, or never will."""
        self._pending -= 1

    def sent(self, frame_bytes: int) -> None:
        """It went out."""
        now = asyncio.get_running_loop().time()
        self._close_window(now)
        took_s, self._progress_s = now - self._progress_s, now
        if took_s <= SUSPECT_AFTER_S:
            self._busy_s += took_s
            self._bytes += frame_bytes

    def bytes_per_s(self) -> float | None:
        """The estimate; None before there is one."""
        self._close_window(asyncio.get_running_loop().time())
        return self._best_bytes_per_s

    def _close_window(self, now: float) -> None:
        if now - self._window_s < WINDOW_S:
            return
        if self._busy_s >= BUSY_S or (self._bytes > SWALLOWED_BYTES and self._busy_s > 0.0):
            sample, best = self._bytes / self._busy_s, self._best_bytes_per_s
            better = best is None or sample >= best
            self._best_bytes_per_s = sample if better or best is None else best + DECAY * (sample - best)
        self._window_s, self._busy_s, self._bytes = now, 0.0, 0
