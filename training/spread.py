"""Several stages at one peer: when it takes one more, and when it gives one back. Pure; `tenure` acts on it.

While peers are fewer than stages, or the last replica of a stage has gone and no other stage can spare one, a
peer with room holds an empty stage beside its own: the run goes on, at the speed that its lane is shared out
at. It gives a stage back once others hold it. As with moves a plan is a hint: who takes one too many gives
it back again, and a stage is only left by LEAVE in its log.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.protocol.identity import PeerId
from shoal.training.rebalance import Placed


@dataclass(frozen=True, slots=True)
class Take:
    """The plan: a peer holds an empty stage besides."""

    peer: PeerId
    stage: int


def take(replicas: Sequence[Placed], stages: int, room: Mapping[PeerId, int], turn: int = 0) -> Take | None:
    """Who should hold an empty stage, None where none is empty or nobody has room.

    `room`: how many more stages each would hold. The first empty one goes to who holds the fewest, then the
    fastest, then the lowest. `turn`: how many were named before and did not come, for want of memory or will:
    then it is the next one's, and after all of them the next empty stage's.
    """
    empty = sorted(set(range(stages)) - {replica.stage for replica in replicas})
    held = Counter(replica.peer for replica in replicas)
    able = [replica for replica in replicas if room.get(replica.peer, 0) > 0]
    able.sort(key=lambda replica: (held[replica.peer], replica.service_s or math.inf, replica.peer))
    peers = list(dict.fromkeys(replica.peer for replica in able))
    if not empty or not peers:
        return None
    stage, peer = divmod(turn % (len(peers) * len(empty)), len(peers))
    return Take(peers[peer], empty[stage])


def give_back(
    online: Sequence[Placed], me: PeerId, taken: Sequence[int], minimum_replicas: int
) -> int | None:
    """Which of its stages a peer should leave to the others that hold it, None while it has to keep all.

    `online`: the replicas that train; `taken`: its own stages in the order in which it came to them. The one
    that most others hold; of several the last taken.
    """
    others = Counter(replica.stage for replica in online if replica.peer != me)
    spare = [stage for stage in taken if others[stage] >= max(minimum_replicas, 1)]
    if len(taken) < 2 or not spare:
        return None
    return max(spare, key=lambda stage: (others[stage], taken.index(stage)))
