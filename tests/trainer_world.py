"""A whole swarm in virtual time: members, pipeline, rounds and recovery on memory links, real compute."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from members_world import RUN, membership, wall
from pipeline_world import SECONDS, small_spec

from shoal.dht.memory_directory import MemoryDirectoryHub
from shoal.node.simulate.feed import RandomFeed
from shoal.node.simulate.peer import SimulatedPeer
from shoal.protocol.amendments import AmendmentBook
from shoal.protocol.memory_transport import Link, MemoryNetwork
from shoal.protocol.revocation import RevocationBook
from shoal.protocol.transport import Transport
from shoal.training.feed import Feed
from shoal.training.spec import RunSpec
from shoal.training.work import Work

torch.set_num_threads(1)
__all__ = ["RandomFeed", "Replica", "TrainerWorld", "round_spec"]
Replica = SimulatedPeer


def round_spec(stages: int, *, outer: Mapping[str, object] | None = None, **inner: object) -> RunSpec:
    """`small_spec` with frequent rounds and fp32 on the wire unless told otherwise."""
    spec = small_spec(
        stages, **{"mode": "stream", "inner_tokens": 64, "warmup_tokens": 0, "learning_rate": 0.1, **inner}
    )
    settings = {"inner_steps": 2, "part_bytes": 4096, "snapshot_every": 4, **(outer or {})}
    return RunSpec.model_validate({**spec.model_dump(), "outer": settings})


class TrainerWorld:
    """Peers by number, each at the stage it is added to."""

    def __init__(
        self,
        spec: RunSpec,
        seed: int = 1,
        latency_s: float = 0.005,
        slower: float = 1.0,
        disk: Path | None = None,
        spare_bytes: int = 0,
        wrap: Callable[[Transport], Transport] = lambda transport: transport,
    ) -> None:
        """`slower`: how many times longer than SECONDS each piece of compute takes. `disk`: each peer has a
        folder there, named by its number; without it nobody writes anything. `spare_bytes`: of each one's
        memory, for copies of other stages."""
        print("seed", seed)
        self.slower = slower
        self.disk = disk
        self.spare_bytes = spare_bytes
        self.wrap = wrap
        self.spec = spec
        self.seed = seed
        self.network = MemoryNetwork(seed, Link(latency_s=latency_s))
        self.hub = MemoryDirectoryHub(membership(0), wall, random.Random(seed + 1))
        self.replicas: dict[int, Replica] = {}
        self._starts = 0

    async def add(
        self,
        number: int,
        stage: int,
        feed: Feed | None = None,
        run: bool = True,
        imported: Path | None = None,
        moves: bool = False,
        most: int = 1,
    ) -> Replica:
        """Start a peer: join, recover, train. `imported`: a folder of checkpoints that only it has; `moves`:
        it goes to another stage when the plan says so, and holds up to `most` at once."""
        replica = self.make(number)
        others = {known.peer for known in self.replicas.values()}
        await replica.start(stage)
        await replica.members.wait_for(lambda view: others <= {m.peer for m in view.here() if m.beat}, 15.0)
        data = feed or RandomFeed(self.spec, number)
        data_dir = self.disk / str(number) if self.disk is not None else None
        self.replicas[number] = replica
        if moves:
            replica.task = asyncio.create_task(
                replica.live_at(stage, lambda at: self._duration_s, data, data_dir, most)
            )
            await replica.members.wait_for(lambda view: replica.online, 15.0)
            return replica
        await replica.train_at(
            stage, self._duration_s, data, data_dir, [imported] if imported is not None else []
        )
        if run:
            replica.task = asyncio.create_task(replica.run())
        return replica

    def make(self, number: int) -> Replica:
        """A peer that was not started yet."""
        self._starts += 1
        member = membership(number)
        member.revocations = RevocationBook(RUN, member.token.root_der)
        member.amendments = AmendmentBook(RUN, member.token.root_der)
        member.renewed.clear()
        return Replica(
            self.spec,
            number,
            membership=member,
            network=self.network,
            hub=self.hub,
            incarnation=self._starts,
            rng=random.Random(self.seed * 1000 + number),
            clock=wall,
            wrap=self.wrap,
            spare_bytes=self.spare_bytes,
        )

    def _duration_s(self, kind: Work) -> float:
        return SECONDS[kind] * self.slower

    async def kill(self, number: int) -> Replica:
        """SIGKILL."""
        replica = self.replicas.pop(number)
        await replica.kill()
        return replica

    async def close(self) -> None:
        for number in list(self.replicas):
            await self.kill(number)

    async def __aenter__(self) -> TrainerWorld:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    def group(self, stage: int) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.stage == stage]

    async def heights(self, height: int, timeout_s: float = 120.0) -> None:
        """Until every replica's log is that high."""
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(replica.reach(height) for replica in self.replicas.values()))
