"""Which stage a joining peer takes. A pure policy over the swarm's view; the trainer of a joiner calls it.

All joiners that announced no stage yet are placed in the order of their ids, each one seeing those before
it, so joiners that look at the same view at the same time spread out without talking.

A stage needs another replica the more, the fewer it has (up to two: a stage with one replica is
one death away from empty); from two on, the one with the least capacity comes first. Capacities are sums of
rates on a scale of powers of two, so that views which differ by noise still agree; a peer whose
rate nobody knows counts as the median of those known.

Hysteresis: a joiner keeps the stage it announced, unless some stage has at least two fewer replicas and
the joiner is the last by id of those joining its stage. A gap of one is not worth a second download,
and of several joiners that collided only one moves at a time.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from shoal.dht.view import Member, SwarmView
from shoal.protocol.identity import PeerId, Role

ENOUGH_REPLICAS = 2


@dataclass(frozen=True, slots=True)
class _Load:
    """What a stage has, or is about to have."""

    replicas: int = 0
    tokens_per_s: float = 0.0


def place(view: SwarmView, me: PeerId, spec_stage_count: int) -> int:
    """The stage `me` should join, in [0, spec_stage_count)."""
    candidates = [member for member in view.here() if Role.TRAINER in member.roles]
    usual = _usual_rate(candidates)
    loads = [_Load()] * spec_stage_count
    for member in candidates:
        if member.state in ("online", "joining"):
            for stage in member.stages:
                if stage < spec_stage_count:
                    loads[stage] = _with(loads[stage], member, usual)
    mine = view.get(me)
    announced = mine.stages[0] if mine and mine.state == "joining" and mine.stages else None
    if announced is not None and announced < spec_stage_count:
        return _keep_or_move(candidates, me, announced, loads)
    waiting = [m for m in candidates if m.state == "joining" and not m.stages and m.peer != me]
    for member in sorted(waiting, key=lambda member: member.peer):
        if member.peer < me:
            stage = _neediest(loads)
            loads[stage] = _with(loads[stage], member, usual)
    return _neediest(loads)


def _keep_or_move(candidates: list[Member], me: PeerId, announced: int, loads: list[_Load]) -> int:
    joining = [m.peer for m in candidates if m.state == "joining" and announced in m.stages]
    neediest = _neediest(loads)
    gap = loads[announced].replicas - loads[neediest].replicas
    return neediest if gap >= 2 and me == max(joining) else announced


def _neediest(loads: list[_Load]) -> int:
    def order(stage: int) -> tuple[int, int, int, int]:
        load = loads[stage]
        return (min(load.replicas, ENOUGH_REPLICAS), _octave(load.tokens_per_s), load.replicas, stage)

    return min(range(len(loads)), key=order)


def _with(load: _Load, member: Member, usual: float) -> _Load:
    rate = member.tokens_per_s or usual
    return replace(load, replicas=load.replicas + 1, tokens_per_s=load.tokens_per_s + rate)


def _usual_rate(members: list[Member]) -> float:
    known = [member.tokens_per_s for member in members if member.tokens_per_s > 0]
    return statistics.median(known) if known else 1.0


def _octave(tokens_per_s: float) -> int:
    """0 for nothing; else the nearest power of two, shifted to stay above 0 for any rate."""
    return 0 if tokens_per_s <= 0 else 64 + round(math.log2(max(tokens_per_s, 2.0**-32)))
