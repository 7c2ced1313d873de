"""A group of replicas of one stage on the memory network, in virtual time, with hand-made inner steps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from members_world import RUN, owner

from shoal.protocol.amendments import AmendmentBook
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.protocol.transport import Transport
from shoal.training.amended import Amended
from shoal.training.outer.context import Context, Meet, Offload, everybody_is_known
from shoal.training.outer.entry import Entry, seats_in
from shoal.training.outer.local import MemoryWeights
from shoal.training.outer.parts import cut
from shoal.training.outer.service import GroupMember, Outer
from shoal.training.recovery.guard import Guard
from shoal.training.spec import RunSpec

torch.set_num_threads(1)
SIZE = 5000  # values; with parts of 4 KiB: five parts
Wrap = Callable[[Transport], Transport]


def round_spec(**sections: Mapping[str, object]) -> RunSpec:
    """Small parts, fp32 on the wire, rounds of two steps, unless told."""
    outer: dict[str, object] = {
        "inner_steps": 2,
        "part_bytes": 4096,
        "round_deadline_s": 4.0,
        "snapshot_every": 4,
    }
    outer |= sections.pop("outer", {})
    codecs: dict[str, object] = {"contribution": "float32", "published": "float32"}
    codecs |= sections.pop("compression", {})
    return RunSpec.model_validate({"outer": outer, "compression": codecs, **sections})


def inline(function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
    """Work on the loop, as the simulator does it; at once, so that it takes no task."""
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    try:
        done.set_result(function(*arguments))
    except Exception as error:
        done.set_exception(error)
    return done


class Node:
    """One replica and its task."""

    def __init__(self, world: World, name: PeerId, incarnation: int, directory: Path | None) -> None:
        self.world = world
        self.name = name
        self.incarnation = incarnation
        self.events: list[tuple[str, dict[str, object]]] = []
        self.suspected: list[tuple[str, str]] = []
        self.transport = world.wrap(world.network.transport(name, frozenset({Role.TRAINER})))
        self.weights = MemoryWeights(world.genesis)
        self.orders = AmendmentBook(RUN, owner().root_der)  # no heartbeat fills it
        self.changes: list[torch.Tensor] = []  # of every inner step this process made
        self.outer = Outer(
            world.spec,
            0,
            me=name,
            incarnation=incarnation,
            transport=self.transport,
            weights=self.weights,
            genesis=world.genesis,
            peers=lambda: world.group(name),
            suspect=lambda peer, reason: self.suspected.append((peer, reason)),
            offload=inline,
            rng=random.Random(f"{world.seed}/{name}/{incarnation}"),
            event=lambda kind, data: self.events.append((kind, data)),
            directory=directory,
            guardians=lambda: [keeper.member() for keeper in world.keepers if keeper.keeps],
            amended=Amended(world.spec, self.orders),
            meet=world.meet_for(name),
            holds=lambda peer: world.holds(name, peer),
        )
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.outer.serve()
        await self.transport.start()
        await self.outer.recover()
        self.world.live[self.name] = self
        self.task = asyncio.create_task(self.outer.run())

    async def reach(self, height: int) -> None:
        """Until the log is that high."""
        await self.outer.wait_until(lambda: self.outer.height >= height)

    def step(self, tokens: int = 100) -> None:
        """One random inner step."""
        change = torch.randn(self.weights.size, generator=self.world.generator) * 0.01
        self.weights.step(change, tokens)
        self.changes.append(change.double())
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
            uplink=self.world.uplinks.get(self.name, 1.0),
            reentering=outer.reentering,
        )

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self.world.live.pop(self.name, None)
        await self.transport.close()


class Keeper:
    """A peer elsewhere that guards the stage."""

    def __init__(self, world: World, number: int, offload: Offload = inline) -> None:
        self.world = world
        self.name = PeerId(f"12D3KooWg{number:02d}".ljust(52, "z"))
        self.transport = world.wrap(world.network.transport(self.name, frozenset({Role.TRAINER})))
        self.silent = False
        context = Context.of(
            world.spec,
            0,
            world.genesis.numel(),
            me=self.name,
            incarnation=1,
            transport=self.transport,
            offload=offload,
            suspect=lambda peer, reason: None,
            event=lambda kind, data: None,
            rng=random.Random(number),
        )
        self.guard = Guard(context, lambda: list(world.group(self.name)), None)
        self.task: asyncio.Task[None] | None = None

    @property
    def keeps(self) -> bool:
        """Whether it has a copy, and others hear of it."""
        return self.guard.beat() is not None and not self.silent

    def member(self) -> GroupMember:
        beat = self.guard.beat()
        assert beat is not None
        return GroupMember(
            peer=self.name,
            incarnation=1,
            height=beat.height,
            head=beat.head,
            state_root=beat.state_root,
            log_tokens=beat.log_tokens,
        )

    async def start(self) -> None:
        """Until it has a copy."""
        await self.transport.start()
        self.task = asyncio.create_task(self.guard.run())
        while not self.keeps:
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
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
        genesis: torch.Tensor | None = None,
        meet_for: Callable[[PeerId], Meet] = lambda peer: everybody_is_known,
    ) -> None:
        self.meet_for = meet_for
        self.spec = spec or round_spec()
        self.seed = seed
        self.wrap: Wrap = wrap or (lambda transport: transport)
        self.network = MemoryNetwork(random.Random(seed))
        self.generator = torch.Generator().manual_seed(seed)
        self.genesis = genesis if genesis is not None else torch.randn(size, generator=self.generator)
        self.live: dict[PeerId, Node] = {}
        self.keepers: list[Keeper] = []
        self.frozen: dict[PeerId, GroupMember] = {}  # what their last beat said
        self.uplinks: dict[PeerId, float] = {}  # bytes a second, where they are known
        self.sides: dict[PeerId, list[Node]] = {}  # whom a peer sees while the group is cut
        self.processes: dict[tuple[str, int], Node] = {}
        self.nodes = [self.node(n) for n in range(replicas)]

    def node(self, number: int, incarnation: int = 1, directory: Path | None = None) -> Node:
        name = PeerId(f"12D3KooWr{number:02d}".ljust(52, "z"))
        node = Node(self, name, incarnation, directory)
        self.processes[name, incarnation] = node
        return node

    async def __aenter__(self) -> Self:
        for node in self.nodes:
            await node.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for keeper in self.keepers:
            await keeper.stop()
        for node in list(self.live.values()):
            await node.stop()

    def group(self, seen_by: PeerId) -> Sequence[GroupMember]:
        nodes = self.sides.get(seen_by, list(self.live.values()))
        return [self.frozen.get(node.name) or node.member() for node in nodes]

    def holds(self, seen_by: PeerId, peer: PeerId) -> bool:
        """Whether somebody may be a replica, as far as this one knows."""
        return True

    def kill(self, node: Node) -> None:
        """SIGKILL: streams break at once, and everybody knows."""
        self.live.pop(node.name, None)
        self.frozen.pop(node.name, None)
        self.network.kill(node.name)
        if node.task is not None:
            node.task.cancel()

    def freeze(self, node: Node) -> None:
        """SIGSTOP: connections stay open; membership notices the silence after two seconds."""
        self.network.freeze(node.name)
        self.frozen[node.name] = node.member()
        asyncio.get_running_loop().call_later(2.0, self.live.pop, node.name, None)

    def thaw(self, node: Node) -> None:
        """SIGCONT."""
        self.network.thaw(node.name)
        del self.frozen[node.name]
        self.live[node.name] = node

    async def rounds(self, count: int, nodes: Sequence[Node] | None = None, each: int = 2) -> None:
        """Let everybody make `each` steps and commit, `count` times."""
        for _ in range(count):
            active = list(nodes if nodes is not None else self.live.values())
            height = active[0].outer.height
            for _ in range(each):
                for node in active:
                    node.step(100 + 10 * int(node.name[9:11]))
            await self.reach(height + 1, active)

    async def reach(self, height: int, nodes: Sequence[Node] | None = None, limit_s: float = 60.0) -> None:
        """Until the nodes' logs are that high."""
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*(node.reach(height) for node in nodes or self.live.values()))

    def everybody_steps(self) -> None:
        """One inner step each."""
        for node in self.live.values():
            node.step()

    def equal(self, nodes: Sequence[Node] | None = None) -> bool:
        """P1: byte-equal heads, roots, anchors and momentum."""
        first, *others = nodes or list(self.live.values())
        return all(
            (o.outer.head, o.outer.state_root) == (first.outer.head, first.outer.state_root)
            and torch.equal(o.outer.anchor, first.outer.anchor)
            and torch.equal(o.outer.momentum, first.outer.momentum)
            for o in others
        )

    def entries(self) -> list[Entry]:
        """The whole log, from whoever has each entry; all who have one must agree."""
        highest = max(node.outer.height for node in self.live.values())
        found = []
        for height in range(1, highest + 1):
            asked = [node.outer.entry(height) for node in self.live.values()]
            kept = [entry for entry in asked if entry is not None]
            assert kept, f"nobody keeps entry {height}"
            assert all(entry == kept[0] for entry in kept), f"entry {height} differs"
            found.append(kept[0])
        return found

    def assert_every_step_is_in_once(self) -> None:
        """P4 against an oracle in fp64 that knows every inner step ever made and reads only the entries.

        The agreed state follows from the listed steps; a live replica's weights are the anchor and
        those of its steps that are not listed yet.
        """
        outer = self.spec.outer
        anchor, momentum = self.genesis.double(), torch.zeros(self.genesis.numel(), dtype=torch.float64)
        block = self.spec.compression.block
        fragments = cut(self.genesis.numel(), outer.part_bytes, block, outer.fragments)
        listed: dict[tuple[str, int, int], int] = {}  # process and part -> its last listed step
        for entry in self.entries():
            for number, part in enumerate(fragments[entry.fragment].parts):
                seats = seats_in(entry.listed_in(number))
                rows = [row for row in entry.contributors if row.seat in seats]
                if not rows:
                    continue
                mean = torch.zeros(part.count, dtype=torch.float64)
                for row in rows:
                    seat = entry.roster[row.seat]
                    key = (seat.peer, seat.incarnation, part.index)
                    made = self.processes[seat.peer, seat.incarnation].changes
                    steps = made[listed.get(key, 0) : row.to_step]
                    share = row.clip * row.tokens / sum(r.tokens for r in rows)
                    mean -= share * sum(step[part.span] for step in steps)
                    listed[key] = row.to_step
                velocity = momentum[part.span].mul_(outer.momentum).add_(mean)
                change = mean + outer.momentum * velocity if outer.nesterov else velocity
                anchor[part.span] -= outer.learning_rate * (change if outer.momentum else mean)
        for node in self.live.values():
            torch.testing.assert_close(node.outer.anchor.double(), anchor, rtol=0.0, atol=2e-5)
            for part in (part for fragment in fragments for part in fragment.parts):
                last = listed.get((node.name, node.incarnation, part.index), 0)
                ahead = sum((step[part.span] for step in node.changes[last:]), torch.zeros(1).double())
                expected = node.outer.anchor[part.span].double() + ahead
                torch.testing.assert_close(
                    node.weights.weights[part.span].double(), expected, rtol=0.0, atol=2e-5
                )
