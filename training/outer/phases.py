"""When a member's part in a round began and ended, phase by phase: what the owner's waterfall shows.

`inner` is the time since the last entry. Then: `prepare` the contribution: copy what it is of, `wait` for
GO, `send` it as it is encoded, `reduce` the own parts, `collect` the others' means, wait for the leader to
`decide`, `apply` the entry. Loop times.
"""

from __future__ import annotations

import asyncio


class Phases:
    """Of one replica. A phase that was not come to is not told."""

    def __init__(self) -> None:
        self._spans: dict[str, tuple[float, float]] = {}
        self._begun: dict[str, float] = {}
        self._applied_s: float | None = None  # the last entry

    def prepare(self) -> None:
        """A leader's PREPARE came: the round begins, perhaps once more."""
        now = _now()
        self._spans.clear()
        self._begun = {"prepare": now}
        if self._applied_s is not None:
            self._spans["inner"] = (self._applied_s, now)

    def begin(self, name: str) -> None:
        """A phase begins, for the first time in this round."""
        self._begun.setdefault(name, _now())

    def end(self, name: str) -> None:
        """It ends; the last end counts, one that did not begin has none."""
        if name in self._begun:
            self._spans[name] = (self._begun[name], _now())

    def applied(self) -> dict[str, dict[str, float]]:
        """The entry is in: start (from PREPARE on) and length of each phase. The next round begins anew."""
        self.end("apply")
        now, zero = _now(), self._begun.get("prepare")
        spans, self._spans, self._begun, self._applied_s = self._spans, {}, {}, now
        if zero is None:
            return {}  # an entry that was fetched: this member had no part in its round
        return {
            name: {"start_s": round(start - zero, 4), "s": round(end - start, 4)}
            for name, (start, end) in spans.items()
        }


def _now() -> float:
    return asyncio.get_running_loop().time()
