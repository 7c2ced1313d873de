"""A group that the network cuts into sides, with membership as `training.neighbours` tells it.

Who is cut off (or frozen) falls silent after two seconds, stays as `silent` in the others' view until 120 s
after it was last heard, then departed; a closed connection departs at once. Inner steps go on all the while.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from outer_faults import Faults
from outer_ledger import Ledger
from outer_world import Node, World

from shoal.protocol.identity import PeerId
from shoal.protocol.memory_transport import Link
from shoal.training.outer.entry import Entry
from shoal.training.outer.service import GroupMember

SUSPECT_S = 2.0
SILENT_S = 120.0


class _Events(list[tuple[str, dict[str, object]]]):
    """Archives each entry as it is applied."""

    def __init__(self, node: Node, ledger: Ledger) -> None:
        super().__init__()
        self._node = node
        self._ledger = ledger

    def append(self, event: tuple[str, dict[str, object]]) -> None:
        super().append(event)
        if event[0] == "round":
            data = self._node.outer._replica.log.entry(int(str(event[1]["height"])))
            assert data is not None
            self._ledger.note(self._node, data)


class PartitionWorld(World):
    """`World` with cuts. A frozen peer is one that is cut off from everybody."""

    def __init__(self, *arguments: Any, silent_s: float = SILENT_S, **options: Any) -> None:
        self._silent_s = silent_s
        self.ledger: Ledger | None = None
        self._last_heard: dict[tuple[PeerId, PeerId], tuple[float, GroupMember, GroupMember]] = {}
        self._beats: dict[Node, tuple[object, GroupMember]] = {}
        self._pace = random.Random(options.get("seed", 1))
        super().__init__(*arguments, **options)

    def node(self, number: int, incarnation: int = 1, directory: Path | None = None) -> Node:
        node = super().node(number, incarnation, directory)
        if self.ledger is None:
            self.ledger = Ledger(self)
        node.events = _Events(node, self.ledger)
        return node

    def step(self, node: Node, tokens: int) -> None:
        """One inner step, which the ledger counts."""
        assert self.ledger is not None
        self.ledger.watch(node)
        node.weights.step(self.ledger.step(node), tokens)
        node.outer.stepped()

    # -- what membership sees

    def group(self, seen_by: PeerId) -> Sequence[GroupMember]:
        if not self._last_heard:
            return [self._beat(self.live[name]) for name in sorted(self.live)]
        found = []
        missing = {other for by, other in self._last_heard if by == seen_by}
        for name in sorted(self.live.keys() | missing):
            if name not in missing:
                found.append(self._beat(self.live[name]))
                continue
            heard_s, beat, silent = self._last_heard[seen_by, name]
            age_s = asyncio.get_running_loop().time() - heard_s
            if age_s < self._silent_s:
                found.append(silent if age_s >= SUSPECT_S else beat)
        return found

    def _beat(self, node: Node) -> GroupMember:
        """What a node says of itself, made anew only where something has changed."""
        outer = node.outer
        key = (outer.state_root, node.weights.inner_steps, outer.reentering)
        known = self._beats.get(node)
        if known is None or known[0] != key:
            known = self._beats[node] = (key, node.member())
        return known[1]

    def cut(self, *sides: Sequence[Node]) -> None:
        """Nothing passes between these sides any more."""
        for i, side in enumerate(sides):
            for other in sides[i + 1 :]:
                for a in side:
                    for b in other:
                        self._lose_sight(a, b)
                        self.network.cut(a.name, b.name)

    async def part_amid_a_round(self, faults: Faults, kind: type, count: int, *sides: Sequence[Node]) -> None:
        """On slow links they part as a message of that kind arrives, and meet again; no step may be lost."""
        faults.hangs = False
        for one, other in itertools.permutations(self.nodes, 2):
            self.network.set_link(one.name, other.name, Link(latency_s=0.02, bytes_per_s=1e5))
        await self.train(15)
        faults.arm(kind, "receiving", lambda peer: self.cut(*sides), count=count)
        await self.train(180)
        assert faults.hit is not None
        await self.heal_whole()

    async def heal_whole(self) -> None:
        """The cut ends, all come to one chain and go on, and no step is lost or in twice."""
        self.heal()
        await self.settle(120)
        self.prove()
        await self.train(20)
        await self.settle()
        self.prove()
        self.assert_nothing_is_lost()

    def heal(self) -> None:
        """Everything passes again; what is frozen, once it is thawed."""
        for one, other in self._last_heard:
            self.network.heal(one, other)
        self._last_heard = {
            pair: heard for pair, heard in self._last_heard.items() if not self.frozen.keys().isdisjoint(pair)
        }

    def kill(self, node: Node) -> None:
        super().kill(node)
        self._last_heard = {
            (by, other): heard for (by, other), heard in self._last_heard.items() if by != node.name
        }

    def freeze(self, node: Node) -> None:
        self.network.freeze(node.name)
        self.frozen[node.name] = node.member()
        for other in self.live.values():
            if other is not node:
                self._lose_sight(node, other)

    def thaw(self, node: Node) -> None:
        self.network.thaw(node.name)
        del self.frozen[node.name]
        self._last_heard = {
            pair: heard
            for pair, heard in self._last_heard.items()
            if node.name not in pair or not self.frozen.keys().isdisjoint(pair) or pair in self._cut_pairs()
        }

    def _cut_pairs(self) -> set[tuple[PeerId, PeerId]]:
        return {pair for pair in self._last_heard if self.network.is_blocked(*pair)}

    def _lose_sight(self, one: Node, other: Node) -> None:
        now_s = asyncio.get_running_loop().time()
        for by, missed in ((one, other), (other, one)):
            beat = missed.member()
            told = now_s, beat, dataclasses.replace(beat, silent=True)
            self._last_heard.setdefault((by.name, missed.name), told)

    # -- work

    async def train(self, seconds: float, every_s: float = 1.0) -> None:
        """Inner steps of everybody, each at its own pace, for some time."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + seconds
        due_s = {name: loop.time() + self._pace.random() * every_s for name in self.live}
        while loop.time() < until_s:
            for name, node in list(self.live.items()):
                if name not in self.frozen and loop.time() >= due_s.setdefault(name, loop.time()):
                    self.step(node, self._pace.randint(50, 150))
                    due_s[name] = loop.time() + every_s * self._pace.uniform(0.7, 1.3)
            next_s = min((due_s[name] for name in self.live if name not in self.frozen), default=until_s)
            await asyncio.sleep(max(0.0, min(next_s, until_s, loop.time() + every_s) - loop.time()))

    async def settle(self, limit_s: float = 60.0, every_s: float = 1.0) -> float:
        """Train on until all who live hold the same head; the seconds that took."""
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        while not self.equal() or self.pending():
            assert loop.time() - begin_s < limit_s, f"not settled after {limit_s:g} s: {self.describe()}"
            await self.train(0.5, every_s)
        return loop.time() - begin_s

    def chain(self) -> list[Entry]:
        """The entries of whoever is highest."""
        assert self.ledger is not None
        return self.ledger.chain(max(self.live.values(), key=lambda node: node.outer.height).outer.head)

    def pending(self) -> bool:
        """Whether somebody still has lost entries to bring back."""
        return any(node.outer.reentering for node in self.live.values())

    def describe(self) -> str:
        return ", ".join(
            f"{node.name[8:11]} {node.outer.height}/{node.outer.head.hex()[:6]} lost {node.outer.reentering}"
            for node in self.live.values()
        )

    def assert_nothing_is_lost(self) -> None:
        """Nobody who lives keeps old steps back: those that `prove` finds in its weights are its last."""
        assert self.ledger is not None
        for node in self.live.values():
            waiting = self.ledger.waiting(node)
            assert waiting <= 60, f"{node.name[8:11]}: {waiting:.0f} steps wait"

    def prove(self, anchor: bool = True) -> None:
        """P1, and P4 by the ledger, for everybody who lives."""
        assert self.equal(), f"heads or states differ: {self.describe()}"
        assert self.ledger is not None
        nodes = list(self.live.values())
        for node in nodes:
            self.ledger.check(node)
        if anchor:
            self.ledger.check_anchor(nodes[0])


torch.set_num_threads(1)
