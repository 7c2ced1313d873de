"""Leaders: whom a member lets lead: replicas of its stage, and none that lately held it up for long in vain.

While a leader speaks nobody else leads here, and one that means no entry could go on like that for ever. What
it may take at one height is what an honest attempt may that comes to nothing; then it leads no more here for
a while, longer each time. `Member` owns one. Times are the loop's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from shoal.protocol import limits
from shoal.protocol.errors import MessageInvalid, Stale
from shoal.protocol.identity import PeerId
from shoal.training.outer.claims import ASIDE_MOST_S, ASIDE_S
from shoal.training.outer.context import Context
from shoal.training.outer.entry import Entry
from shoal.training.outer.messages import Prepare
from shoal.training.outer.policy import REPORT_SLACK_S

_HELD_DEADLINES = 3.0  # for answers one, for reports two (`Leader`), and the slack of these

Holds = Callable[[PeerId], bool]  # whether a peer may be a replica of the stage, as far as is known here


class Leaders:
    """See the module."""

    def __init__(self, context: Context, holds: Holds, members: Callable[[], int]) -> None:
        """`members`: how many the group has, as far as is known here."""
        self._context = context
        self._holds = holds
        self._members = members
        self._most_s = _HELD_DEADLINES * context.spec.outer.round_deadline_s + REPORT_SLACK_S
        self._leader: PeerId | None = None  # of the round under way
        self._since_s = 0.0
        self._held_s: dict[PeerId, float] = {}  # in vain, at the height to come
        self._times: Counter[PeerId] = Counter()  # set aside since it last led to an entry
        self._until_s: dict[PeerId, float] = {}  # set aside

    def check(self, leader: PeerId, now_s: float) -> None:
        """Raises Stale for who may not lead here now."""
        if leader == self._context.me:
            return
        if not self._holds(leader):
            raise Stale(f"{leader} is no replica of stage {self._context.stage}, as far as is known here")
        if now_s < self._until_s.get(leader, now_s) or self._held(leader, now_s) > self._most_s:
            raise Stale(f"{leader} has held this peer up for too long")

    def engage(self, leader: PeerId, now_s: float) -> None:
        """It leads the round under way, perhaps since an earlier attempt."""
        if self._leader != leader:
            self._leader, self._since_s = leader, now_s

    def disengage(self, now_s: float) -> None:
        """It leads it no more, and there is no entry."""
        leader, self._leader = self._leader, None
        if leader is None or leader == self._context.me:
            return
        self._held_s[leader] = held_s = self._held_s.get(leader, 0.0) + now_s - self._since_s
        if held_s > self._most_s:
            self._set_aside(leader, now_s)

    def entered(self, leader: PeerId | None) -> None:
        """The log has gone on: by an entry that this leader made, or otherwise."""
        self._leader = None
        self._held_s.clear()
        if leader is not None:
            self._times.pop(leader, None)

    def _held(self, leader: PeerId, now_s: float) -> float:
        held_s = self._held_s.get(leader, 0.0)
        return held_s + now_s - self._since_s if self._leader == leader else held_s

    def _set_aside(self, leader: PeerId, now_s: float) -> None:
        """Where half of the group would be, nobody: then it is not they who are to blame."""
        self._until_s = {peer: until_s for peer, until_s in self._until_s.items() if now_s < until_s}
        self._until_s[leader] = now_s + min(ASIDE_S * 2.0 ** self._times[leader], ASIDE_MOST_S)
        self._times[leader] = min(self._times[leader] + 1, 16)
        del self._held_s[leader]
        if len(self._times) > limits.RECORDS_HELD:  # ids cost nothing
            self._times.clear()
        if 2 * len(self._until_s) >= self._members():
            self._until_s.clear()
            return
        self._context.event("leader-set-aside", {"peer": leader})


def check_offer(context: Context, prepare: Prepare, offer: Entry, leader: PeerId) -> None:
    """Raises MessageInvalid for an offer that is not what PREPARE says, or to another group."""
    says = context.stage, prepare.height, prepare.previous, prepare.ballot, leader
    if (offer.stage, offer.height, offer.previous, offer.ballot, offer.leader) != says:
        raise MessageInvalid(f"the offer of {leader} is not what its PREPARE says")
    if offer.seat_of(context.me) is None:
        raise MessageInvalid(f"{leader} offers this peer no seat")
