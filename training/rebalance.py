"""Rebalancing: which one replica should move to which stage. A pure policy; `node/tenure` acts on it.

Every peer computes the same plan from what it sees; the one that the plan names moves, if its group lets it
go (LEAVE in the log, one at a time). Views differ, so a plan is a hint: safety sits with the group.

The pipeline is as fast as its slowest stage, whose rate is the sum over its replicas (of a swarm known in
part each one stands for several). The best move is the one that raises the slowest stage most; what a
replica would do at another stage follows from its measured rate and the stages' costs. It has to leave its
old stage well above what the slowest one had; how much one replica of hundreds adds is not asked, since it
costs so much less. A stage that is empty, or one loss away from it, takes the emergency lane.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.dht.view import is_measured
from shoal.protocol.identity import PeerId

LEAST_GAP = 0.10  # between a source without the mover and the slowest stage; less is noise of measurements
ENOUGH = 2  # replicas with which a stage outlives a loss
HORIZON_S = 1800.0  # over which a move has to earn what it costs
_STEPS = 8  # of rates per octave: views that differ by noise still agree


@dataclass(frozen=True, slots=True)
class Placed:
    """One replica, as its beats tell."""

    peer: PeerId
    stage: int
    service_s: float  # lane time of one micro-batch at its stage; 0: not measured yet
    fixed: bool = False  # its owner wants it to stay
    stands_for: float = 1.0  # replicas of its stage, where not all of them are known


@dataclass(frozen=True, slots=True)
class Move:
    """The plan: one peer, from one stage to another."""

    peer: PeerId
    source: int
    target: int
    emergency: bool  # the target is about to be lost: no second window is waited for
    gain: float  # of the slowest stage's rate, as a share; infinite where it stood still


def plan(
    replicas: Sequence[Placed], costs: Sequence[float], minimum_replicas: int, move_s: float
) -> Move | None:
    """The one move that helps most, None where all is well.

    `costs`: of a micro-batch at each stage, in any unit. `move_s`: during which a mover does no work.
    """
    replicas = [replica for replica in replicas if replica.stage < len(costs)]  # a claim beyond is nobody's
    rates = _unit_rates(replicas, costs)
    groups: list[list[Placed]] = [[] for _ in costs]
    for replica in replicas:
        groups[replica.stage].append(replica)
    sizes = [sum(replica.stands_for for replica in group) for group in groups]
    capacity = [
        sum(rates[r.peer] * r.stands_for for r in group) / cost
        for group, cost in zip(groups, costs, strict=True)
    ]
    needy = min(range(len(costs)), key=lambda stage: (min(sizes[stage], ENOUGH), capacity[stage]))
    best: Move | None = None
    left = 0.0  # that the best move leaves at its source
    for source, group in enumerate(groups):
        stay = minimum_replicas if not groups[needy] else max(minimum_replicas, ENOUGH)
        if source == needy or sizes[source] - 1 < max(stay, 1):
            continue
        emergency = sizes[needy] < ENOUGH
        for replica in (replica for replica in group if not replica.fixed):
            now, stays = capacity[needy], capacity[source] - rates[replica.peer] / costs[source]
            then = min(now + rates[replica.peer] / costs[needy], stays)
            gain = then / now - 1.0 if now > 0 else math.inf
            lost = move_s * rates[replica.peer] / costs[source]  # micro-batches, while it moves
            if not emergency and (stays < (1.0 + LEAST_GAP) * now or (then - now) * HORIZON_S < lost):
                continue
            found = Move(replica.peer, source, needy, emergency, gain)
            if best is None or _rank(found, stays) > _rank(best, left):
                best, left = found, stays
    return best


def settled(previous: Move | None, current: Move | None) -> Move | None:
    """A plan to act on: one that won two windows in a row, or an emergency."""
    if current is None or current.emergency:
        return current
    same = previous is not None and (previous.peer, previous.target) == (current.peer, current.target)
    return current if same else None


def _rank(move: Move, left: float) -> tuple[bool, float, float, str]:
    """Emergencies first, then more gain; then what stays behind; then the peer's id."""
    return (move.emergency, min(move.gain, 1e9), left, move.peer)


def _unit_rates(replicas: Sequence[Placed], costs: Sequence[float]) -> dict[PeerId, float]:
    """Cost units a second of each peer, quantised; who has not measured counts as the median."""
    known = {r.peer: _quantised(costs[r.stage] / r.service_s) for r in replicas if is_measured(r.service_s)}
    ordered = sorted(known.values())
    usual = ordered[len(ordered) // 2] if ordered else 1.0
    return {r.peer: known.get(r.peer, usual) for r in replicas}


@functools.lru_cache(maxsize=1 << 16)
def _quantised(rate: float) -> float:
    return float(2.0 ** (round(math.log2(rate) * _STEPS) / _STEPS))
