"""A pipeline without rounds or membership: real compute on the memory network, in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from shoal.dht.directory import SignedRecord
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.protocol.transport import Transport
from shoal.training.lane import InlineLane, Lane
from shoal.training.model.layout import StageLayout, genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.compute import StageCompute
from shoal.training.pipeline.driver import Driver
from shoal.training.pipeline.hop import Hop
from shoal.training.pipeline.ledger import Ledger
from shoal.training.pipeline.replicas import Replica
from shoal.training.pipeline.station import Station
from shoal.training.spec import RunSpec
from shoal.training.weights import Weights
from shoal.training.work import Work, paced

torch.set_num_threads(1)
SECONDS = {Work.UPDATE: 0.001, Work.BACKWARD: 0.02, Work.FORWARD: 0.01, Work.WEIGHT: 0.01, Work.SERVE: 0.01}


def small_spec(stages: int, **inner: object) -> RunSpec:
    """A model small enough for hundreds of micro-batches a second; SGD and no clipping unless told."""
    settings = {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "micro_batch_sequences": 2,
        "inner_tokens": 10**9,
        "clip_norm": 0.0,
        "weight_decay": 0.0,
        "mode": "flush",
        **inner,
    }
    model = {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "feedforward": 48, "sequence": 16}
    return RunSpec.model_validate({"model": model, "inner": settings, "stages": {"count": stages}})


def batches(spec: RunSpec, count: int, seed: int = 5) -> list[torch.Tensor]:
    """Random micro-batches [B, T+1]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.inner.micro_batch_sequences, spec.model.sequence + 1)
    return [torch.randint(0, spec.data.vocabulary, shape, generator=generator) for _ in range(count)]


@dataclass
class Peer:
    """One replica."""

    name: PeerId
    stage: int
    layout: StageLayout
    transport: Transport
    lane: Lane
    weights: Weights
    ledger: Ledger
    driver: Driver | None = None
    hop: Hop | None = None
    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    incarnation: int = 1
    beat: Replica | None = None  # as others heard it last


class World:
    """All peers; also the membership that the pipeline sees (`Replicas`), perfect but for `blind` peers."""

    def __init__(
        self,
        spec: RunSpec,
        replicas: int,
        seed: int = 1,
        service_s: Callable[[int, int], float] | None = None,
        wrap: Callable[[Transport], Transport] = lambda transport: transport,
    ) -> None:
        """`service_s`: of (stage, number in it), lane time of a micro-batch; SECONDS if it is not given.

        `wrap` puts something around each peer's transport (faults).
        """
        self.spec = spec
        self._service_s = service_s
        self._wrap = wrap
        self.rng = random.Random(seed)
        self.network = MemoryNetwork(random.Random(seed + 1))
        self.dead: set[str] = set()
        self.gone: set[str] = set()  # silent for long, as the membership sees it
        self.suspected: list[tuple[str, str]] = []
        self.slower: dict[str, float] = {}  # by how much the lane of a peer has become slower
        self._change = asyncio.Event()
        names = [
            f"12D3KooW{'s'}{stage}r{n}".ljust(52, "1")
            for stage in range(spec.stages.count)
            for n in range(replicas)
        ]
        self.peers = [self._peer(PeerId(name), *divmod(i, replicas)) for i, name in enumerate(names)]

    def _peer(self, name: PeerId, stage: int, number: int) -> Peer:
        spec = self.spec
        layout = stage_layout(spec, stage_ranges(spec)[stage])
        transport = self._wrap(self.network.transport(name, frozenset({Role.TRAINER})))
        pace = SECONDS.__getitem__ if self._service_s is None else paced(self._service_s(stage, number))
        lane = InlineLane(lambda kind: pace(kind) * self.slower.get(name, 1.0))
        weights = Weights(spec, layout, genesis(spec, layout), lane, "cpu")
        compute = StageCompute(
            spec, StageModel(spec, layout), weights, "cpu", lambda: spec.inner.learning_rate
        )
        peer = Peer(name, stage, layout, transport, lane, weights, Ledger())
        rng = random.Random(self.rng.getrandbits(64))

        def event(kind: str, data: dict[str, object]) -> None:
            peer.events.append((kind, data))

        station = Station(
            spec,
            stage,
            me=name,
            incarnation=peer.incarnation,
            transport=transport,
            replicas=self,
            compute=compute,
            lane=lane,
            ledger=peer.ledger,
            stepped=lambda: None,
            added=lambda tokens, stepped: None,
            event=event,
            rng=rng,
            decisions=None,
        )
        peer.driver, peer.hop = station.driver, station.hop
        station.serve()
        return peer

    async def __aenter__(self) -> World:
        for peer in self.peers:
            await peer.transport.start()
        self._tasks = {p.name: asyncio.create_task(p.hop.run()) for p in self.peers if p.hop}
        return self

    async def __aexit__(self, *exc: object) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for peer in self.peers:
            await peer.transport.close()

    def of_stage(self, stage: int) -> Sequence[Replica]:
        return [self._heard(peer) for peer in self.stage(stage) if peer.name not in self.dead]

    def _heard(self, peer: Peer) -> Replica:
        """The peer's last heartbeat: one a second."""
        now = asyncio.get_running_loop().time()
        if peer.beat is None or now - peer.beat.heard_s >= 1.0:
            load = peer.lane.load()
            peer.beat = Replica(peer.name, 0.002, load.backlog_s, load.service_s, now)
        return peer.beat

    def suspect(self, peer: PeerId, reason: str) -> None:
        self.suspected.append((peer, reason))

    def is_gone(self, peer: PeerId) -> bool:
        return peer in self.dead | self.gone

    async def meet(self, peer: PeerId, chain: Sequence[PeerId]) -> None:
        return

    def record_of(self, peer: PeerId) -> SignedRecord | None:
        return None

    def has_departed(self, peer: PeerId, incarnation: int | None = None) -> bool:
        return peer in self.dead

    async def changed(self) -> None:
        await self._change.wait()

    def kill(self, peer: Peer) -> None:
        """The process is gone: its streams break at once and everybody knows."""
        self.network.kill(peer.name)
        if peer.name in self._tasks:
            self._tasks[peer.name].cancel()
        self.dead.add(peer.name)
        self._change.set()
        self._change = asyncio.Event()

    def stage(self, stage: int) -> list[Peer]:
        return [peer for peer in self.peers if peer.stage == stage]

    def drivers(self) -> list[Driver]:
        return [peer.driver for peer in self.stage(0) if peer.driver is not None]

    async def train(self, everything: list[torch.Tensor]) -> None:
        """Deal the micro-batches to the drivers and take all through."""
        drivers = self.drivers()
        async with asyncio.TaskGroup() as tasks:
            for n, driver in enumerate(drivers):
                tasks.create_task(driver.train(everything[n :: len(drivers)]))
        for peer in self.peers:
            if peer.hop is not None and peer.name not in self.dead:
                await peer.hop.drained()
