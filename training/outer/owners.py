"""Owners: who publishes nothing of the parts that it owns. `Turns` has one.

Who answers, but whose bulk stream is stuck, say, would have its parts skipped in every round (P3): it owns
nothing for a while, longer each time. A new process of its begins anew: the one before may have died amid it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import NamedTuple

from shoal.protocol import limits
from shoal.protocol.identity import PeerId
from shoal.training.outer.claims import ASIDE_MOST_S, ASIDE_S


class Owner(NamedTuple):
    """A process that owns parts."""

    peer: PeerId
    incarnation: int


class Owners:
    """See the module. Times are the loop's."""

    def __init__(self) -> None:
        self._times: Counter[Owner] = Counter()  # set aside since it last published anything
        self._until_s: dict[Owner, float] = {}

    def note(self, published: Mapping[Owner, bool], now_s: float) -> list[Owner]:
        """Whether each owner in a round published anything that most have; whom that sets aside."""
        aside = sorted(owner for owner, something in published.items() if not something)
        for owner in published.keys() - aside:
            self._times.pop(owner, None)
        for owner in aside:
            self._until_s[owner] = now_s + min(ASIDE_S * 2.0 ** self._times[owner], ASIDE_MOST_S)
            self._times[owner] = min(self._times[owner] + 1, 16)
        if len(self._times) > limits.RECORDS_HELD:  # ids cost nothing
            self._times.clear()
        return aside

    def aside(self, now_s: float) -> Collection[Owner]:
        """Who is to own nothing."""
        self._until_s = {owner: until_s for owner, until_s in self._until_s.items() if now_s < until_s}
        return self._until_s.keys()
