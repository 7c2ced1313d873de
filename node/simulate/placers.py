"""Whose rules say which stage a peer serves in the policy simulation: ours, or SWARM's.

Ours: `training.placement` for joiners, who have read all of the directory (the sums that it makes of a
view are kept up to date here, for all joiners together), and `training.rebalance` for everybody else, as
every peer would plan.
SWARM's: joiners go to the stage with the longest queues; every five minutes the peer with the shortest queue
at the stage with the shortest queues moves there, too.
"""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence

from shoal.node.simulate.fleet import Node
from shoal.node.simulate.flow import Flow
from shoal.node.simulate.places import Places
from shoal.training.placement import Loads
from shoal.training.rebalance import Move, plan, settled


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
        *,
        window_s: float,
        minimum_replicas: int,
        move_s: float,
    ) -> None:
        self.window_s = window_s
        self._places = places
        self._costs = costs
        self._loads = Loads(costs)
        self._speeds: dict[Node, float] = {}
        self._usual = 1.0
        self._minimum_replicas = minimum_replicas
        self._move_s = move_s
        self._last: Move | None = None

    def join(self, node: Node, now: float) -> int:
        return self._loads.neediest(self._usual)

    def came(self, node: Node) -> None:
        self._speeds[node] = speed = self._costs[node.stage] / node.service_s
        self._loads.add(node.stage, speed)

    def went(self, node: Node) -> None:
        if (speed := self._speeds.pop(node, None)) is not None:
            self._loads.add(node.stage, -speed, -1)

    def move(self, now: float) -> tuple[Node, int] | None:
        nodes = [node for group in self._places.groups for node in group.nodes]
        self._usual = statistics.median(self._speeds.values()) if self._speeds else 1.0
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
        groups = self._places.groups
        return [
            float(sum(map(self._flow.waiting, group.nodes))) if len(group) else float("inf")
            for group in groups
        ]
