"""Which stage a joining peer takes. A pure policy over the swarm's view; `placing` and the simulator call it.

All joiners that announced no stage yet are placed in the order of their ids, each one seeing those before
it, so joiners that look at the same view at the same time spread out without talking.

A stage needs another replica the more, the fewer it has (up to two: a stage with one replica is one death
away from empty); from two on, the one with the least capacity comes first. The capacity of a stage is what
its replicas' lanes can do, in micro-batches: a peer's speed, its stage's cost over its time for a
micro-batch, divided by that cost. What replicas commit says nothing here, since all stages commit the same.
It is counted in usual replicas, in whole ones, so that views which differ by noise still agree; a peer whose
speed nobody knows counts as the median of those known, one that holds several stages shares its speed out. Of
a swarm known in part, each known replica stands for as many as its stage has for each one known, and a joiner
compares a few stages only (`tried`).

Hysteresis: a joiner keeps the stage it announced, unless everybody is known, some stage has at least two
fewer replicas and the joiner is the last by id of those joining its stage. A gap of one is not worth a
second download, and of several joiners that collided only one moves at a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from hashlib import blake2b

from shoal.dht.view import Member, SwarmView, is_measured
from shoal.protocol.identity import PeerId, Role

ENOUGH_REPLICAS = 2
TRIED = 3  # of 10,000 peers at 24 stages in simulation 0.906 of the ideal, comparing all 0.894


class Loads:
    """What each stage has, or is about to have."""

    def __init__(self, costs: Sequence[float]) -> None:
        mean = statistics.fmean(costs)
        self.costs = [cost / mean for cost in costs]
        self.replicas = [0.0] * len(costs)
        self.speeds = [0.0] * len(costs)  # of all replicas together

    def add(self, stage: int, speed: float, replicas: float = 1.0) -> None:
        """So many replicas, each of this speed."""
        self.replicas[stage] += replicas
        self.speeds[stage] += replicas * speed

    def neediest(self, among: Sequence[int], usual: float = 1.0) -> int:
        """Which of these stages, or of those with too few replicas, needs another one most.

        `usual`: a replica's speed, in the unit of those added.
        """
        few = (stage for stage, replicas in enumerate(self.replicas) if replicas < ENOUGH_REPLICAS)
        return min(sorted({*among, *few}), key=lambda stage: self._need(stage, usual))

    def _need(self, stage: int, usual: float) -> tuple[float, int, float]:
        replicas, speed = self.replicas[stage], self.speeds[stage] / usual
        return (min(replicas, ENOUGH_REPLICAS), round(speed / self.costs[stage]), replicas)


def tried(joiner: PeerId, stages: int) -> list[int]:
    """The stages that a joiner compares which knows the swarm in part: a few, drawn for each (Mitzenmacher,
    "The power of two choices in randomized load balancing", 2001).

    The least of many noisy estimates is the one that errs most. Where all were compared, stages whose size
    is hard to tell drew joiners until they had some per cent too many, and the others too few.
    """
    return sorted(range(stages), key=lambda s: blake2b(f"{joiner} {s}".encode(), digest_size=8).digest())[
        :TRIED
    ]


def place(view: SwarmView, me: PeerId, costs: Sequence[float]) -> int:
    """The stage `me` should join. `costs`: of a micro-batch at each stage, in any unit."""
    loads = Loads(costs)
    candidates = [member for member in view.here() if Role.TRAINER in member.roles]
    speeds = _speeds(candidates, costs)
    stands_for = [view.share(stage) for stage in range(len(costs))]
    for member in candidates:
        for stage in member.stages:
            if stage < len(costs) and member.state_at(stage) in ("online", "joining"):
                loads.add(stage, speeds.get(member.peer, 1.0) / len(member.stages), stands_for[stage])
    mine = view.get(me)
    announced = mine.stages[0] if mine and mine.state == "joining" and mine.stages else None
    if announced is not None and announced < len(costs):
        return announced if view.sizes else _keep_or_move(candidates, me, announced, loads)
    waiting = [m for m in candidates if m.state == "joining" and not m.stages and m.peer < me]
    for other in waiting:
        loads.add(loads.neediest(_compared(view, other.peer, costs)), 1.0)
    return loads.neediest(_compared(view, me, costs))


def _compared(view: SwarmView, joiner: PeerId, costs: Sequence[float]) -> Sequence[int]:
    return tried(joiner, len(costs)) if view.sizes else range(len(costs))


def _keep_or_move(candidates: list[Member], me: PeerId, announced: int, loads: Loads) -> int:
    joining = [m.peer for m in candidates if m.state == "joining" and announced in m.stages]
    neediest = loads.neediest(range(len(loads.costs)))
    gap = loads.replicas[announced] - loads.replicas[neediest]
    return neediest if gap >= 2 and me == max(joining) else announced


def _speeds(members: list[Member], costs: Sequence[float]) -> dict[PeerId, float]:
    """Of those known, in units of the usual one's."""
    known = {
        m.peer: costs[m.stages[0]] / m.service_s
        for m in members
        if is_measured(m.service_s) and m.stages and m.stages[0] < len(costs)
    }
    usual = statistics.median(known.values()) if known else 1.0
    return {peer: speed / usual for peer, speed in known.items()}
