"""Which server a client asks for a stage. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoal.protocol.identity import PeerId
from shoal.training.pipeline.replicas import Replica


def choose(
    replicas: Sequence[Replica], avoid_until_s: Mapping[PeerId, float], now_s: float, draw: float
) -> PeerId | None:
    """The replica that would answer soonest: round trip and backlog; `draw` in [0, 1) splits ties.

    None when all that are known refused or failed lately.
    """
    free = [one for one in replicas if avoid_until_s.get(one.peer, now_s) <= now_s]
    if not free:
        return None
    cost_s = {one.peer: one.rtt_s + one.backlog_s for one in free}
    least_s = min(cost_s.values())
    best = sorted(peer for peer, cost in cost_s.items() if cost <= 1.2 * least_s)
    return best[int(draw * len(best))]
