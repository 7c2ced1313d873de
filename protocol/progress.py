"""Whether bytes move: the pulse of a connection, and a watchdog over one frame. Used by `framed_stream`.

Silence is judged by frames that get through. One that does not raises the alarm after SUSPECT_AFTER_S and
ends its stream after ABORT_AFTER_S, unless its connection moves other streams' frames (a slow uplink
shared by many is not silent); then FRAME_S is the limit. So that a slow link shows movement at all, frames
get smaller where they take long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from shoal.protocol.limits import (
    ABORT_AFTER_S,
    FIRST_FRAME_BYTES,
    FRAME_BYTES,
    FRAME_S,
    LEAST_FRAME_BYTES,
    SUSPECT_AFTER_S,
)

_QUICK_FRAME_S = 0.05
_SLOW_FRAME_S = 0.5  # far below SUSPECT_AFTER_S, even where several streams share a link


@dataclass(slots=True, weakref_slot=True)
class Pulse:
    """How a connection moves: when it last did (loop time), and the frame size that suits it."""

    moved_s: float = 0.0
    frame_bytes: int = FIRST_FRAME_BYTES

    def moved(self) -> None:
        """A frame came in."""
        self.moved_s = asyncio.get_running_loop().time()

    def wrote(self, frame_bytes: int, since_s: float, now: float) -> None:
        """A frame went out that was handed over at `since_s`. Double the size where that was quick."""
        self.moved_s = now
        if now - since_s > _SLOW_FRAME_S:
            self.frame_bytes = max(LEAST_FRAME_BYTES, self.frame_bytes // 2)
        elif now - since_s < _QUICK_FRAME_S and frame_bytes >= self.frame_bytes:
            self.frame_bytes = min(FRAME_BYTES, self.frame_bytes * 2)


class Watchdog:
    """Inside the context a frame should move: calls `suspect`, then `silent`, once each, if none does.

    One for all frames of a direction, one after another: its timer outlives them, since most move at once.
    """

    def __init__(
        self, pulse: Pulse, suspect: Callable[[float], None], silent: Callable[[float], None]
    ) -> None:
        self._pulse = pulse
        self._suspect = suspect
        self._silent = silent
        self._loop = asyncio.get_running_loop()
        self._since_s: float | None = None  # when the frame began; None between two
        self._suspected = False
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> None:
        self._since_s, self._suspected = self._loop.time(), False
        if self._timer is None or self._timer.when() > self._since_s + SUSPECT_AFTER_S:
            self._disarm()
            self._timer = self._loop.call_at(self._since_s + SUSPECT_AFTER_S, self._check)

    def __exit__(self, *exc: object) -> None:
        self._since_s = None

    def cancel(self) -> None:
        """At the end of the stream: nobody is told any more."""
        self._suspect = self._silent = _tell_nobody
        self._disarm()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        if self._since_s is None:
            return
        now = self._loop.time()
        quiet_since_s = max(self._since_s, self._pulse.moved_s)
        abort_at_s = min(quiet_since_s + ABORT_AFTER_S, self._since_s + FRAME_S)
        suspect_at_s = min(quiet_since_s + SUSPECT_AFTER_S, abort_at_s)
        if now >= abort_at_s:
            self._silent(now - quiet_since_s)
            return
        if now >= suspect_at_s and not self._suspected:
            self._suspected = True
            self._suspect(now - quiet_since_s)
        next_s = abort_at_s if self._suspected or now >= suspect_at_s else suspect_at_s
        self._timer = self._loop.call_at(next_s, self._check)


def _tell_nobody(silent_s: float) -> None:
    """Of a stream that has ended."""
