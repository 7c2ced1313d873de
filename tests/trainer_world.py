"""A whole swarm in virtual time: members, pipeline, rounds and recovery on memory links, real compute."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from members_world import RUN, membership, wall
from pipeline_world import SECONDS, small_spec

from shoal.dht.beats import Beat
from shoal.dht.directory import PeerRecord
from shoal.dht.members import Members
from shoal.dht.memory_directory import MemoryDirectoryHub
from shoal.dht.records import RecordBook
from shoal.protocol.contacts import ContactBook
from shoal.protocol.identity import PeerId
from shoal.protocol.memory_transport import Link, MemoryNetwork
from shoal.protocol.revocation import RevocationBook
from shoal.protocol.transport import Transport
from shoal.training.checkpoint.manifest import CHECKPOINTS_FOLDER, START_FOLDER
from shoal.training.checkpoint.share import Shelf
from shoal.training.feed import Feed
from shoal.training.lane import InlineLane
from shoal.training.spec import RunSpec
from shoal.training.trainer import Trainer

torch.set_num_threads(1)
__all__ = ["RandomFeed", "Replica", "TrainerWorld", "round_spec"]


def round_spec(stages: int, *, outer: Mapping[str, object] | None = None, **inner: object) -> RunSpec:
    """`small_spec` with frequent rounds and fp32 on the wire unless told otherwise."""
    spec = small_spec(
        stages, **{"mode": "stream", "inner_tokens": 64, "warmup_tokens": 0, "learning_rate": 0.1, **inner}
    )
    settings = {"inner_steps": 2, "part_bytes": 4096, "snapshot_every": 4, **(outer or {})}
    return RunSpec.model_validate({**spec.model_dump(), "outer": settings})


class RandomFeed:
    """Endless micro-batches of a few repeated tokens, so that the loss has somewhere to fall."""

    def __init__(self, spec: RunSpec, seed: int) -> None:
        self._spec = spec
        self._generator = torch.Generator().manual_seed(seed)
        self._stream = seed
        self._drawn = 0

    async def next_batch(self) -> torch.Tensor:
        self._drawn += self._spec.inner.micro_batch_sequences
        return self._draw()

    def _draw(self) -> torch.Tensor:
        shape = (self._spec.inner.micro_batch_sequences, self._spec.model.sequence + 1)
        return torch.randint(0, 8, shape, generator=self._generator)

    def position(self) -> tuple[int, int]:
        return self._stream, self._drawn

    def resume(self, position: int) -> None:
        self._drawn = position

    def held_out(self) -> torch.Tensor:
        return torch.arange(self._spec.model.sequence + 1).remainder(8).repeat(2, 1)


@dataclass
class Replica:
    """One running peer."""

    number: int
    peer: PeerId
    stage: int
    members: Members
    trainer: Trainer
    events: list[tuple[float, str, dict[str, object]]] = field(default_factory=list)
    task: asyncio.Task[None] | None = None

    async def reach(self, height: int) -> None:
        """Until the log is that high."""
        await self.trainer.outer.wait_until(lambda: self.trainer.outer.height >= height)

    def heard(self, kind: str) -> list[dict[str, object]]:
        return [data for _, found, data in self.events if found == kind]


class TrainerWorld:
    """Peers by number, each at the stage it is added to."""

    def __init__(
        self,
        spec: RunSpec,
        seed: int = 1,
        latency_s: float = 0.005,
        slower: float = 1.0,
        disk: Path | None = None,
        wrap: Callable[[Transport], Transport] = lambda transport: transport,
    ) -> None:
        """`slower`: how many times longer than SECONDS each piece of compute takes. `disk`: each peer has a
        folder there, named by its number; without it nobody writes anything."""
        print("seed", seed)
        self.slower = slower
        self.disk = disk
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
    ) -> Replica:
        """Start a peer: join, recover, train. `imported`: a folder of checkpoints that only it has."""
        self._starts += 1
        incarnation = self._starts
        member = membership(number)
        member.revocations = RevocationBook(RUN, member.token.root_der)
        member.renewed.clear()
        transport = self.wrap(self.network.transport(member.key.peer, member.me.roles))
        data_dir = self.disk / str(number) if self.disk is not None else None
        folders = [imported] if imported is not None else []
        found: list[Replica] = []
        state = ["joining"]

        def record() -> PeerRecord:
            return PeerRecord(
                peer=member.key.peer,
                incarnation=incarnation,
                sequence=0,
                issued_unix_s=0.0,
                ttl_s=30.0,
                state=state[0],
                stages=(stage,),
                name=f"p{number}",
                addresses=("127.0.0.1:5000",),
                chain=member.chain,
                device="cpu",
                tokens_per_s=0.0,
                version="0",
            )

        def beat() -> Beat:
            return found[0].trainer.heartbeat() if found and state[0] == "online" else Beat()

        members = Members(
            transport=transport,
            directory=self.hub.directory(member.key.peer, member),
            membership=member,
            contacts=ContactBook(),
            record_book=RecordBook(member),
            make_record=record,
            make_beat=beat,
            clock=wall,
            rng=random.Random(self.seed * 1000 + number),
        )

        async def offload(function: object, *arguments: object) -> object:
            assert callable(function)
            return function(*arguments)

        def event(kind: str, data: dict[str, object]) -> None:
            replica.events.append((asyncio.get_running_loop().time(), kind, data))

        trainer = Trainer(
            self.spec,
            stage,
            transport=transport,
            members=members,
            lane=InlineLane(lambda kind: SECONDS[kind] * self.slower),
            offload=offload,
            feed=(feed or RandomFeed(self.spec, number)) if stage == 0 else None,
            me=member.key.peer,
            incarnation=incarnation,
            event=event,
            rng=random.Random(self.seed * 7000 + number),
            data_dir=data_dir,
            imported=folders,
        )
        if data_dir is not None:
            Shelf([*folders, data_dir / CHECKPOINTS_FOLDER, data_dir / START_FOLDER], offload).serve(
                transport
            )
        replica = Replica(number, member.key.peer, stage, members, trainer)
        await transport.start()
        await members.start()
        others = {known.peer for known in self.replicas.values()}
        await members.wait_for(lambda view: others <= {m.peer for m in view.here() if m.beat}, 15.0)
        await trainer.recover()
        found.append(replica)
        state[0] = "online"
        members.changed_now()
        self.replicas[number] = replica
        if run:
            replica.task = asyncio.create_task(trainer.run())
        return replica

    async def kill(self, number: int) -> Replica:
        """SIGKILL."""
        replica = self.replicas.pop(number)
        self.network.kill(replica.peer)
        await self._stop(replica)
        return replica

    async def close(self) -> None:
        for number in list(self.replicas):
            await self.kill(number)

    async def __aenter__(self) -> TrainerWorld:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _stop(self, replica: Replica) -> None:
        if replica.task is not None:
            replica.task.cancel()
            await asyncio.gather(replica.task, return_exceptions=True)
        await replica.members.close()

    def group(self, stage: int) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.stage == stage]

    async def heights(self, height: int, timeout_s: float = 120.0) -> None:
        """Until every replica's log is that high."""
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(replica.reach(height) for replica in self.replicas.values()))
