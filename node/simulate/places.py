"""Who is at which stage in the policy simulation, and who knows whom: what membership tells real peers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from shoal.dht.neighbours import SMALL_SWARM
from shoal.node.simulate.fleet import Node
from shoal.node.simulate.flow import Flow

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
    """See the module. Keeps what `Flow`'s router knows up to date."""

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
        self._callers[node] = {}
        own = self.groups[stage]
        own.add(node)
        if stage + 1 < len(self.groups):
            for replica in self.groups[stage + 1].sample(self._rng, KNOWN):
                self._introduce(node, replica)
        if stage > 0:
            before = self.groups[stage - 1]
            fair = max(1, round(KNOWN * len(before) / len(own))) if len(own) > KNOWN else len(before)
            for caller in before.sample(self._rng, fair):
                self._introduce(caller, node)

    def withdraw(self, node: Node) -> None:
        """It takes no more work; whoever called it finds somebody else."""
        if node not in self._callers:
            return
        stage = node.stage
        self.groups[stage].remove(node)
        for caller in self._callers.pop(node):
            self._flow.router.part(caller, node)
            self._complete(caller)

    def leave(self, node: Node) -> None:
        """It is gone."""
        self.withdraw(node)
        self.everybody.remove(node)
        for replica in node.known:
            self._callers[replica].pop(node, None)
        node.known.clear()

    def _complete(self, caller: Node) -> None:
        group = self.groups[caller.stage + 1]
        if len(caller.known) < min(KNOWN, len(group)):
            for replica in group.sample(self._rng, KNOWN):
                if replica not in caller.known:
                    self._introduce(caller, replica)
                    return

    def _introduce(self, caller: Node, replica: Node) -> None:
        self._callers[replica][caller] = None
        self._flow.met(caller, replica)
