"""With whom to hold a heartbeat stream: everybody in a small swarm, the useful ones in a large one.

A pure policy; `members` acts on it. In a large swarm the places go to a peer's own group, the next and
the previous stage, then anybody; unused places fall to the later tiers. Within a tier the pairs
with the smallest hash win. The hash is of the unordered pair, so a choice tends to be mutual and few
streams are held by one side's wish alone; and the sample over everybody keeps the graph of gossip
in one piece (k least edges of random weight: k = 4 already suffices for hundreds of peers).
"""

from __future__ import annotations

from shoal.dht.interest import pair_weight
from shoal.dht.view import SwarmView
from shoal.protocol.identity import PeerId

SMALL_SWARM = 32
_SHARES = (3, 3, 1)  # eighths of the places for own group, next stage, previous stage


def neighbours(view: SwarmView, me: PeerId, limit: int = SMALL_SWARM) -> frozenset[PeerId]:
    """At most `limit` peers, never `me`, never a gone one."""
    others = [member for member in view.here() if member.peer != me]
    if len(others) <= limit:
        return frozenset(member.peer for member in others)
    mine = view.get(me)
    stages = mine.stages if mine else ()
    tiers = (
        frozenset(stages),
        frozenset(stage + 1 for stage in stages),
        frozenset(stage - 1 for stage in stages),
    )
    ranked = sorted(others, key=lambda member: pair_weight(me, member.peer))
    chosen: set[PeerId] = set()
    places = 0
    for share, near in zip(_SHARES, tiers, strict=True):
        places += limit * share // 8
        tier = [m.peer for m in ranked if m.peer not in chosen and not near.isdisjoint(m.stages)]
        chosen.update(tier[: max(0, places - len(chosen))])
    rest = [member.peer for member in ranked if member.peer not in chosen]
    chosen.update(rest[: limit - len(chosen)])
    return frozenset(chosen)
