"""Whose rules say which stage a peer serves in the policy simulation: ours, or SWARM's.

Ours: `training.placement` for joiners, who have looked into the directory, and `training.rebalance` for
everybody else, as every peer would plan.
SWARM's: joiners go to the stage with the longest queues; every five minutes the peer with the shortest queue
at the stage with the shortest queues moves there, too.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from shoal.dht.buckets import Spot, Survey
from shoal.dht.roster import NEWCOMERS_LOOKS
from shoal.node.simulate.directory import Shelves
from shoal.node.simulate.fleet import Node
from shoal.node.simulate.flow import Flow
from shoal.node.simulate.places import Places
from shoal.training.placement import Loads, tried
from shoal.training.rebalance import Move, plan, settled


class Placer(ABC):
    """One set of rules. `window_s` is how often `move` is asked."""

    window_s: float
    newcomers_records = 0  # that joiners read in the directory

    @abstractmethod
    def join(self, node: Node, now: float) -> int:
        """The stage that a new peer takes."""

    @abstractmethod
    def move(self, now: float) -> tuple[Node, int] | None:
        """Who should move, and to which stage."""


class ShoalPlacer(Placer):
    """`placement` and `rebalance`."""

    def __init__(
        self,
        places: Places,
        shelves: Shelves,
        costs: Sequence[float],
        rng: random.Random,
        *,
        window_s: float,
        minimum_replicas: int,
        move_s: float,
    ) -> None:
        self.window_s = window_s
        self._places = places
        self._shelves = shelves
        self._costs = costs
        self._rng = rng
        self._minimum_replicas = minimum_replicas
        self._move_s = move_s
        self._last: Move | None = None

    def join(self, node: Node, now: float) -> int:
        survey = Survey(Spot.of(node.name, bytes(32)), self._rng)
        looks = [self._shelves.look(survey, (), widely=True) for _ in range(NEWCOMERS_LOOKS)]
        self.newcomers_records += sum(len(rows) for look in looks for rows in look)
        sizes = survey.sizes()
        of_use = looks if sizes else looks[:1]  # so few that each look shows everybody
        rows = np.concatenate([rows for look in of_use for rows in look])
        size = len(self._costs)
        seen = np.bincount(rows["stage"], minlength=size)
        speeds = np.bincount(rows["stage"], rows["speed"], minlength=size)
        loads = Loads(self._costs)
        for stage in np.flatnonzero(seen).tolist():
            replicas = sizes.get(stage, 0.0) if sizes else float(seen[stage])
            loads.add(stage, float(speeds[stage] / seen[stage]), replicas)
        compared = tried(node.name, size) if sizes else range(size)
        return loads.neediest(compared, float(np.median(rows["speed"])) if len(rows) else 1.0)

    def move(self, now: float) -> tuple[Node, int] | None:
        nodes = [node for group in self._places.groups for node in group.nodes]
        current = plan(
            [node.as_placed() for node in nodes], self._costs, self._minimum_replicas, self._move_s
        )
        chosen = settled(self._last, current)
        self._last = current
        if chosen is None:
            return None
        return next(node for node in nodes if node.name == chosen.peer), chosen.target


class SwarmPlacer(Placer):
    """Queue lengths alone."""

    window_s = 300.0

    def __init__(self, places: Places, flow: Flow) -> None:
        self._places = places
        self._flow = flow

    def join(self, node: Node, now: float) -> int:
        queues = self._queues()
        return queues.index(max(queues))

    def move(self, now: float) -> tuple[Node, int] | None:
        queues = self._queues()
        source, target = queues.index(min(queues)), queues.index(max(queues))
        group = self._places.groups[source].nodes
        if source == target or len(group) < 2:
            return None
        return min(group, key=lambda node: (self._flow.waiting(node), node.number)), target

    def _queues(self) -> list[float]:
        """Of each stage; an empty one is the most loaded."""
        pieces = self._flow.waiting_by_stage()
        groups = self._places.groups
        return [float(pieces[stage]) if len(group) else float("inf") for stage, group in enumerate(groups)]
