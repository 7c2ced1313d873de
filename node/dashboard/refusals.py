"""What the page refused, logged once: the first of a kind at once, the rest of a minute as a number."""

from __future__ import annotations

import logging
from collections.abc import Callable

EVERY_S = 60.0

_log = logging.getLogger("shoal.dashboard")


class Refusals:
    """One per process. `clock`: seconds that only grow."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._told_at: dict[str, float] = {}
        self._since: dict[str, int] = {}

    def note(self, kind: str, who: str) -> None:
        """Something of this kind was refused. `kind` is one of our own words, so there are few."""
        now = self._clock()
        if now - self._told_at.get(kind, -EVERY_S) < EVERY_S:
            self._since[kind] = self._since.get(kind, 0) + 1
            return
        more = self._since.pop(kind, 0)
        self._told_at[kind] = now
        _log.warning("refused %s, from %s%s", kind, who, f"; {more} more since the last line" if more else "")


class Bucket:
    """A rate limit: `burst` at once, `per_s` in the long run."""

    def __init__(self, clock: Callable[[], float], burst: int, per_s: float) -> None:
        self._clock, self._burst, self._per_s = clock, burst, per_s
        self._left, self._at = float(burst), clock()

    def take(self) -> bool:
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
