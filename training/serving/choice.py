"""Which server a client asks for a stage, and which one stands by. Pure.

A server costs a text, for each token: the way there, what is queued on its lane, and a step among those of
the sessions that it has, as it claims to take of late.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from shoal.protocol.identity import PeerId
from shoal.training.pipeline.replicas import Replica


def cost_s(one: Replica, usual_s: float) -> float:
    """Of a token at this replica; `usual_s` is a step where nobody knows."""
    return one.rtt_s / 2 + one.backlog_s + (one.step_s or usual_s)


def choose(
    replicas: Sequence[Replica], avoid_until_s: Mapping[PeerId, float], now_s: float, draw: float
) -> PeerId | None:
    """The replica that costs least; `draw` in [0, 1) splits ties.

    One that claims no step may be as fast as the fastest. None when all refused or failed lately.
    """
    free = [one for one in replicas if avoid_until_s.get(one.peer, now_s) <= now_s]
    if not free:
        return None
    usual_s = min((one.step_s for one in free if one.step_s), default=0.0)
    costs_s = {one.peer: cost_s(one, usual_s) for one in free}
    least_s = min(costs_s.values())
    best = sorted(peer for peer, cost in costs_s.items() if cost <= 1.2 * least_s)
    return best[int(draw * len(best))]


def stand_by(
    replicas: Sequence[Replica],
    chain: Collection[PeerId | None],
    kept: PeerId | None,
    avoid_until_s: Mapping[PeerId, float],
    now_s: float,
    draw: float,
) -> PeerId | None:
    """A replica that has no part in the chain, to go on at when the stage's server fails; if possible `kept`.

    What takes down one machine then takes nothing that stands by for another. None where all are in use.
    """
    apart = [one for one in replicas if one.peer not in chain]
    kept_one = [one for one in apart if one.peer == kept]
    return choose(kept_one, avoid_until_s, now_s, draw) or choose(apart, avoid_until_s, now_s, draw)
