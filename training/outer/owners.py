"""Owners: who publishes nothing of the parts that it owns. `Turns` has one.

Who answers, but whose bulk stream is stuck, say, would have its parts skipped in every round (P3): it owns
nothing for a while, longer each time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from shoal.protocol import limits
from shoal.protocol.identity import PeerId
from shoal.training.outer.claims import ASIDE_MOST_S, ASIDE_S


class Owners:
    """See the module. Times are the loop's."""

    def __init__(self) -> None:
        self._times: Counter[PeerId] = Counter()  # set aside since it last published anything
        self._until_s: dict[PeerId, float] = {}

    def note(self, published: Mapping[PeerId, bool], now_s: float) -> list[PeerId]:
        """Whether each owner in a round published anything that most have; whom that sets aside."""
        aside = sorted(peer for peer, something in published.items() if not something)
        for peer in published.keys() - aside:
            self._times.pop(peer, None)
        for peer in aside:
            self._until_s[peer] = now_s + min(ASIDE_S * 2.0 ** self._times[peer], ASIDE_MOST_S)
            self._times[peer] = min(self._times[peer] + 1, 16)
        if len(self._times) > limits.RECORDS_HELD:  # ids cost nothing
            self._times.clear()
        return aside

    def aside(self, now_s: float) -> Collection[PeerId]:
        """Who is to own nothing."""
        self._until_s = {peer: until_s for peer, until_s in self._until_s.items() if now_s < until_s}
        return self._until_s.keys()
