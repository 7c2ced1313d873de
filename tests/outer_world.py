"""A group of replicas of one stage on the memory network, in virtual time, with hand-made inner steps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.protocol.transport import Transport
from shoal.training.outer.local import MemoryWeights
from shoal.training.outer.service import GroupMember, Outer
from shoal.training.spec import RunSpec

torch.set_num_threads(1)
SIZE = 5000  # values; with parts of 4 KiB: five parts
Wrap = Callable[[Transport], Transport]


def round_spec(**sections: dict[str, object]) -> RunSpec:
    """Small parts, fp32 on the wire, rounds of two steps, unless told."""
    outer = {"inner_steps": 2, "part_bytes": 4096, "round_deadline_s": 4.0, "snapshot_every": 4}
    outer |= sections.pop("outer", {})
    codecs = {"contribution": "float32", "published": "float32"} | sections.pop("compression", {})
    return RunSpec.model_validate({"outer": outer, "compression": codecs, **sections})


async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    """Work on the loop, as the simulator does it."""
    return function(*arguments)


class Node:
    """One replica and its task."""

    def __init__(
        self, world: World, name: PeerId, incarnation: int, size: int, directory: Path | None
    ) -> None:
        self.world = world
        self.name = name
        self.incarnation = incarnation
        self.events: list[tuple[str, dict[str, object]]] = []
        self.suspected: list[tuple[str, str]] = []
        self.entries: list[bytes] = []
        self.transport = world.wrap(world.network.transport(name, frozenset({Role.TRAINER})))
        self.weights = MemoryWeights(world.genesis)
        self.ledger = torch.zeros(size, dtype=torch.float64)  # everything this process ever stepped
        self.outer = Outer(
            world.spec,
            0,
            me=name,
            incarnation=incarnation,
            transport=self.transport,
            weights=self.weights,
            genesis=world.genesis,
            peers=world.group,
            suspect=lambda peer, reason: self.suspected.append((peer, reason)),
            offload=inline,
            rng=random.Random(f"{world.seed}/{name}/{incarnation}"),
            event=lambda kind, data: self.events.append((kind, data)),
            directory=directory,
        )
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.outer.serve()
        await self.transport.start()
        await self.outer.recover()
        self.world.live[self.name] = self
        self.task = asyncio.create_task(self.outer.run())

    def step(self, tokens: int = 100) -> None:
        """One random inner step."""
        change = torch.randn(self.weights.size, generator=self.world.generator) * 0.01
        self.weights.step(change, tokens)
        self.ledger += change.double()
        self.outer.stepped()

    def member(self) -> GroupMember:
        outer = self.outer
        return GroupMember(
            peer=self.name,
            incarnation=self.incarnation,
            height=outer.height,
            head=outer.head,
            state_root=outer.state_root,
            steps_since_round=outer.steps_since_round,
            tokens_since_round=outer.tokens_since_round,
            log_tokens=outer.tokens,
        )

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self.world.live.pop(self.name, None)
        await self.transport.close()


class World:
    """The group, its network, and the membership that all of them see: who lives, at once."""

    def __init__(
        self,
        replicas: int,
        spec: RunSpec | None = None,
        *,
        seed: int = 1,
        size: int = SIZE,
        wrap: Wrap | None = None,
    ) -> None:
        self.spec = spec or round_spec()
        self.seed = seed
        self.wrap: Wrap = wrap or (lambda transport: transport)
        self.network = MemoryNetwork(random.Random(seed))
        self.generator = torch.Generator().manual_seed(seed)
        self.genesis = torch.randn(size, generator=self.generator)
        self.live: dict[PeerId, Node] = {}
        self.nodes = [self.node(n) for n in range(replicas)]

    def node(self, number: int, incarnation: int = 1, directory: Path | None = None) -> Node:
        name = PeerId(f"12D3KooWr{number}".ljust(52, "1"))
        return Node(self, name, incarnation, self.genesis.numel(), directory)

    async def __aenter__(self) -> World:
        for node in self.nodes:
            await node.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for node in list(self.live.values()):
            await node.stop()

    def group(self) -> Sequence[GroupMember]:
        return [node.member() for node in self.live.values()]

    def kill(self, node: Node) -> None:
        """SIGKILL: streams break at once, and everybody knows."""
        self.live.pop(node.name, None)
        self.network.kill(node.name)
        if node.task is not None:
            node.task.cancel()

    async def rounds(self, count: int, nodes: Sequence[Node] | None = None, each: int = 2) -> None:
        """Let everybody make `each` steps and commit, `count` times."""
        for _ in range(count):
            active = list(nodes if nodes is not None else self.live.values())
            height = active[0].outer.height
            for _ in range(each):
                for node in active:
                    node.step(100 + 10 * int(node.name[9]))
            await self.reach(height + 1, active)

    async def reach(self, height: int, nodes: Sequence[Node] | None = None, limit_s: float = 60.0) -> None:
        """Until the nodes' logs are that high."""
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*(n.outer.wait_for_height(height) for n in nodes or self.live.values()))

    def equal(self, nodes: Sequence[Node] | None = None) -> bool:
        """P1: byte-equal heads, roots, anchors and momentum."""
        first, *others = nodes or list(self.live.values())
        return all(
            (o.outer.head, o.outer.state_root) == (first.outer.head, first.outer.state_root)
            and torch.equal(o.outer.anchor, first.outer.anchor)
            and torch.equal(o.outer.momentum, first.outer.momentum)
            for o in others
        )


Scenario = Callable[[World], Awaitable[None]]
