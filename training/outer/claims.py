"""Claims: who says that it is ahead, and hands over nothing of what it says it has.

A few such members must not keep the others from going on (P3): after some attempts in vain they count as
silent for a while, longer each time. They keep their place in the quorum, for they may speak the truth.
`Turns` owns one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from shoal.protocol import limits
from shoal.protocol.identity import PeerId

ATTEMPTS = 3  # at one height
ASIDE_S, ASIDE_MOST_S = 30.0, 600.0


class Claims:
    """See the module. Times are the loop's."""

    def __init__(self) -> None:
        self._failed: Counter[PeerId] = Counter()  # attempts at the height to come
        self._times: Counter[PeerId] = Counter()  # set aside since it last kept its word
        self._until_s: dict[PeerId, float] = {}

    def failed(self, peers: Collection[PeerId], members: int, now_s: float) -> list[PeerId]:
        """An attempt was in vain because of what `peers` of a group of `members` say; whom that sets aside.

        Nobody, where they are half of the group: then it is this peer that has to reach them.
        """
        if 2 * len(peers) >= members:
            return []
        self._failed.update(peers)
        aside = sorted(peer for peer in peers if self._failed[peer] >= ATTEMPTS)
        for peer in aside:
            del self._failed[peer]
            self._until_s[peer] = now_s + min(ASIDE_S * 2.0 ** self._times[peer], ASIDE_MOST_S)
            self._times[peer] = min(self._times[peer] + 1, 16)
        if len(self._times) > limits.RECORDS_HELD:  # ids cost nothing
            self._times.clear()
        return aside

    def kept(self, peers: Collection[PeerId]) -> None:
        """These have handed over what they said they have."""
        for peer in peers:
            self._times.pop(peer, None)

    def next_height(self) -> None:
        """What was in vain before was for the height before."""
        self._failed.clear()

    def aside(self, now_s: float) -> Collection[PeerId]:
        """Who counts as silent."""
        self._until_s = {peer: until_s for peer, until_s in self._until_s.items() if now_s < until_s}
        return self._until_s.keys()
