"""Who is at which stage in the policy simulation, and who knows whom: what membership tells real peers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from shoal.dht.neighbours import SMALL_SWARM
from shoal.node.simulate.fleet import Node
from shoal.node.simulate.flow import Flow
from shoal.node.simulate.tables import KNOWN_MOST

KNOWN = SMALL_SWARM * 3 // 8  # of the next stage: its share of a large swarm's neighbours


class Drawable:
    """A set that can be sampled; its order follows from what was done to it."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._where: dict[Node, int] = {}

    def __len__(self) -> int:
        return len(self.nodes)

    def add(self, node: Node) -> None:
        self._where[node] = len(self.nodes)
        self.nodes.append(node)

    def remove(self, node: Node) -> None:
        at = self._where.pop(node)
        last = self.nodes.pop()
        if last is not node:
            self.nodes[at] = last
            self._where[last] = at

    def sample(self, rng: random.Random, most: int) -> list[Node]:
        """All, or so many of them."""
        return list(self.nodes) if len(self.nodes) <= most else rng.sample(self.nodes, most)


class Places:
    """See the module. Keeps what `Flow`'s callers know up to date."""

    def __init__(self, flow: Flow, stages: int, rng: random.Random) -> None:
        self.everybody = Drawable()  # those who are joining, too
        self.groups: Sequence[Drawable] = [Drawable() for _ in range(stages)]  # online
        self._flow = flow
        self._rng = rng
        self._callers: dict[Node, dict[Node, None]] = {}

    def arrive(self, node: Node) -> None:
        """It is here, without a stage that it serves."""
        self.everybody.add(node)

    def serve(self, node: Node) -> None:
        """It is online: it meets replicas of the next stage, and some of the previous one meet it."""
        stage = node.stage
        self._flow.serve(node)
        self._callers[node] = {}
        own = self.groups[stage]
        own.add(node)
        met = []
        if stage + 1 < len(self.groups):
            met += [(node, replica) for replica in self.groups[stage + 1].sample(self._rng, KNOWN)]
        if stage > 0:
            before = self.groups[stage - 1]
            fair = max(1, round(KNOWN * len(before) / len(own))) if len(own) > KNOWN else len(before)
            met += [(caller, node) for caller in before.sample(self._rng, fair)]
        self._introduce(met)

    def withdraw(self, node: Node) -> None:
        """It takes no more work; whoever called it finds somebody else."""
        if node not in self._callers:
            return
        stage = node.stage
        self.groups[stage].remove(node)
        callers = list(self._callers.pop(node))
        for caller in callers:
            del caller.known[node]
        self._flow.withdraw(node, callers)
        self._introduce([(caller, found) for caller in callers for found in self._another(caller)])

    def leave(self, node: Node) -> None:
        """It is gone."""
        self.withdraw(node)
        self.everybody.remove(node)
        for replica in node.known:
            self._callers[replica].pop(node, None)
        node.known.clear()
        if node.index >= 0:
            self._flow.die(node)

    def _another(self, caller: Node) -> list[Node]:
        """One more that this caller might know, if it knows few."""
        group = self.groups[caller.stage + 1]
        if len(caller.known) >= min(KNOWN, len(group)):
            return []
        strangers = (node for node in group.sample(self._rng, KNOWN) if node not in caller.known)
        return list(itertools.islice(strangers, 1))

    def _introduce(self, met: list[tuple[Node, Node]]) -> None:
        """(caller, replica): they hear of one another, unless the caller knows as many as it can."""
        found = [(caller, replica) for caller, replica in met if len(caller.known) < KNOWN_MOST]
        for caller, replica in found:
            caller.known[replica] = None
            self._callers[replica][caller] = None
        self._flow.introduce(found)
