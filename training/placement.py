"""Which stage a joining peer takes. A pure policy over the swarm's view; `placing` and the simulator call it.

All joiners that announced no stage yet are placed in the order of their ids, each one seeing those before
it, so joiners that look at the same view at the same time spread out without talking.

A stage needs another replica the more, the fewer it has (up to two: a stage with one replica is one death
away from empty); from two on, the one with the least capacity comes first. The capacity of a stage is what
its replicas' lanes can do, in micro-batches: a peer's speed, its stage's cost over its time for a
micro-batch, divided by that cost. What replicas commit says nothing here, since all stages commit the same.
It is counted in usual replicas, in whole ones, so that views which differ by noise still agree; a peer whose
speed nobody knows counts as the median of those known.

Hysteresis: a joiner keeps the stage it announced, unless some stage has at least two fewer replicas and
the joiner is the last by id of those joining its stage. A gap of one is not worth a second download,
and of several joiners that collided only one moves at a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.dht.view import Member, SwarmView, is_measured
from shoal.protocol.identity import PeerId, Role

ENOUGH_REPLICAS = 2


@dataclass(frozen=True, slots=True)
class _Load:
    """What a stage has, or is about to have."""

    cost: float  # of a micro-batch; the mean of the stages is 1
    replicas: int = 0
    speed: float = 0.0  # of all replicas together; the usual one's is 1

    @property
    def need(self) -> tuple[int, int, int]:
        """The least comes first."""
        return (min(self.replicas, ENOUGH_REPLICAS), round(self.speed / self.cost), self.replicas)


def place(view: SwarmView, me: PeerId, costs: Sequence[float]) -> int:
    """The stage `me` should join. `costs`: of a micro-batch at each stage, in any unit."""
    mean = statistics.fmean(costs)
    loads = [_Load(cost / mean) for cost in costs]
    candidates = [member for member in view.here() if Role.TRAINER in member.roles]
    speeds = _speeds(candidates, costs)
    for member in candidates:
        if member.state in ("online", "joining"):
            for stage in member.stages:
                if stage < len(loads):
                    loads[stage] = _with(loads[stage], speeds.get(member.peer, 1.0))
    mine = view.get(me)
    announced = mine.stages[0] if mine and mine.state == "joining" and mine.stages else None
    if announced is not None and announced < len(loads):
        return _keep_or_move(candidates, me, announced, loads)
    waiting = [m for m in candidates if m.state == "joining" and not m.stages and m.peer < me]
    for _ in waiting:
        stage = _neediest(loads)
        loads[stage] = _with(loads[stage], 1.0)
    return _neediest(loads)


def _keep_or_move(candidates: list[Member], me: PeerId, announced: int, loads: list[_Load]) -> int:
    joining = [m.peer for m in candidates if m.state == "joining" and announced in m.stages]
    neediest = _neediest(loads)
    gap = loads[announced].replicas - loads[neediest].replicas
    return neediest if gap >= 2 and me == max(joining) else announced


def _neediest(loads: list[_Load]) -> int:
    return min(range(len(loads)), key=lambda stage: loads[stage].need)


def _with(load: _Load, speed: float) -> _Load:
    return replace(load, replicas=load.replicas + 1, speed=load.speed + speed)


def _speeds(members: list[Member], costs: Sequence[float]) -> dict[PeerId, float]:
    """Of those known, in units of the usual one's."""
    known = {
        m.peer: costs[m.stages[0]] / m.service_s
        for m in members
        if is_measured(m.service_s) and m.stages and m.stages[0] < len(costs)
    }
    usual = statistics.median(known.values()) if known else 1.0
    return {peer: speed / usual for peer, speed in known.items()}
