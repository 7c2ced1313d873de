"""Looking back: what a tab asks the history for when its scrubber moves, one question at a time.

The newest wish wins; what lies between two answers of the daemon is skipped. Of the history a tab holds one
moment and one curve, however long the run is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from shoal.node.dashboard.feed import Feed
from shoal.node.dashboard.panels.scrubber import reach
from shoal.node.dashboard.state import PageState, Past
from shoal.node.view.snapshot import Snapshot
from shoal.protocol.errors import ShoalError

POINTS = 240  # of the curve behind the scrubber
NEAR_LIVE_S = 5.0  # the scrubber's right end is now


@dataclass(frozen=True, slots=True)
class _Wish:
    at: float
    window_s: float
    until: float


class Looking:
    """See the module. One per tab."""

    def __init__(
        self, feed: Feed, state: Callable[[], PageState], become: Callable[[PageState], None]
    ) -> None:
        self._feed, self._state, self._become = feed, state, become
        self._wish: _Wish | None = None
        self._asking = False

    async def at(self, values: Mapping[str, object]) -> None:
        """The scrubber was moved to `value`, or a button names the moment."""
        state = self._state()
        try:
            at = float(str(values.get("value", values.get("at", ""))))
        except ValueError:
            return
        _, until, step = reach(state)
        if at >= until - max(NEAR_LIVE_S, step) and "value" in values:
            return self.live(values)
        await self._want(_Wish(at, state.window_s, until))

    async def window(self, values: Mapping[str, object]) -> None:
        """How far back the scrubber reaches."""
        try:
            window_s = float(str(values.get("seconds", "")))
        except ValueError:
            return
        self._become(replace(self._state(), window_s=window_s))
        past = self._state().past
        if past is not None:
            await self._want(_Wish(past.snapshot.at, window_s, past.until))

    def live(self, values: Mapping[str, object]) -> None:
        """Back to now."""
        self._wish = None
        self._become(replace(self._state(), past=None))

    async def _want(self, wish: _Wish) -> None:
        self._wish = wish
        if self._asking:
            return
        self._asking = True
        try:
            while (wished := self._wish) is not None:
                past = await self._past(wished)
                if self._wish is wished:
                    self._wish = None
                    self._become(replace(self._state(), past=past, question=None, rates_open=False))
        except (ShoalError, ValueError) as error:
            self._wish = None
            self._become(replace(self._state(), told=str(error)))
        finally:
            self._asking = False

    async def _past(self, wish: _Wish) -> Past:
        """Raises ShoalError, and ValueError for what is no Snapshot."""
        known = self._state().past
        if known is not None and (known.window_s, known.until) == (wish.window_s, wish.until):
            curve = known.curve
        else:
            reach = {"since": wish.until - wish.window_s, "until": wish.until, "points": POINTS}
            told = await self._feed.ask("history", what="series", name="tokens_per_s", **reach)
            curve = tuple((at, rate) for at, rate in told["points"])
        found = await self._feed.ask("history", what="moment", at=wish.at)
        return Past(
            snapshot=_with_losses(Snapshot.from_json(found["snapshot"]), self._feed.snapshot),
            before=found["before"],
            after=found["after"],
            window_s=wish.window_s,
            until=max(wish.until, found["at"]),
            curve=curve,
        )


def _with_losses(then: Snapshot, now: Snapshot | None) -> Snapshot:
    """The curve as far as it went then: it is kept once, not in every moment."""
    if now is None:
        return then
    return replace(
        then,
        loss=tuple(point for point in now.loss if point.at <= then.at),
        markers=tuple(mark for mark in now.markers if mark.at <= then.at),
    )
