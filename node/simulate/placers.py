"""Whose rules say which stage a peer serves in the policy simulation: ours, or SWARM's.

Ours: `training.placement` for joiners, who have read the directory, of a large one as much as an answer of it
holds, and `training.rebalance` for everybody else, as every peer would plan.
SWARM's: joiners go to the stage with the longest queues; every five minutes the peer with the shortest queue
at the stage with the shortest queues moves there, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal.node.simulate.fleet import Node
from shoal.node.simulate.flow import Flow
from shoal.node.simulate.places import Places
from shoal.training.placement import Loads
from shoal.training.rebalance import Move, plan, settled

_SEEN_BY_JOINER = 2500  # records: what a bucket's holder answers at most (`dht.kademlia.call_guard`)


class Placer(ABC):
    """One set of rules. `window_s` is how often `move` is asked."""

    window_s: float

    def came(self, node: Node) -> None:
        """It has taken a stage, and announced that."""
        return

    def went(self, node: Node) -> None:
        """It is leaving its stage, or gone."""
        return

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
        costs: Sequence[float],
        rng: np.random.Generator,
        *,
        window_s: float,
        minimum_replicas: int,
        move_s: float,
    ) -> None:
        self.window_s = window_s
        self._places = places
        self._costs = costs
        self._rng = rng
        self._announced: list[Node] = []  # their stages, in the order of the arrays
        self._places_of: dict[Node, int] = {}
        self._stages, self._speeds = np.zeros(1024, np.int64), np.zeros(1024)
        self._minimum_replicas = minimum_replicas
        self._move_s = move_s
        self._last: Move | None = None

    def join(self, node: Node, now: float) -> int:
        count = len(self._announced)
        seen: Any = slice(count)
        if count > _SEEN_BY_JOINER:
            seen = self._rng.choice(count, _SEEN_BY_JOINER, replace=False, shuffle=False)
        stages, speeds = self._stages[seen], self._speeds[seen]
        loads, size = Loads(self._costs), len(self._costs)
        replicas, sums = np.bincount(stages, minlength=size), np.bincount(stages, speeds, minlength=size)
        for stage in range(size):
            loads.add(stage, float(sums[stage]), int(replicas[stage]))
        return loads.neediest(float(np.median(speeds)) if count else 1.0)

    def came(self, node: Node) -> None:
        at = self._places_of[node] = len(self._announced)
        self._announced.append(node)
        if at == len(self._stages):
            self._stages, self._speeds = np.resize(self._stages, 2 * at), np.resize(self._speeds, 2 * at)
        self._stages[at], self._speeds[at] = node.stage, self._costs[node.stage] / node.service_s

    def went(self, node: Node) -> None:
        at = self._places_of.pop(node, None)
        if at is None:
            return
        last = len(self._announced) - 1
        self._announced[at], self._stages[at], self._speeds[at] = (
            self._announced[last],
            self._stages[last],
            self._speeds[last],
        )
        if at != last:
            self._places_of[self._announced[at]] = at
        self._announced.pop()

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
