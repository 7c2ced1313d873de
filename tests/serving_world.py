"""Servers of sessions on the memory network, in virtual time, with real compute on a small model."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoal.dht.directory import SignedRecord
from shoal.protocol.errors import RecordInvalid
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import Link, MemoryNetwork
from shoal.protocol.transport import Transport
from shoal.training.lane import InlineLane
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.replicas import Replica
from shoal.training.serving.chain import Generation
from shoal.training.serving.draft import DraftModel
from shoal.training.serving.form import Form
from shoal.training.serving.messages import SamplingOptions
from shoal.training.serving.server import SessionServer
from shoal.training.serving.tuning import TuningServer
from shoal.training.serving.versions import Versions
from shoal.training.spec import RunSpec

torch.set_num_threads(1)
GREEDY = SamplingOptions()
PROMPT = [10, 20, 30, 40, 50]


def serving_spec(stages: int, sequence: int = 128, **more: object) -> RunSpec:
    model = {
        "layers": stages,
        "width": 16,
        "heads": 2,
        "kv_heads": 1,
        "feedforward": 16,
        "sequence": sequence,
        **more,
    }
    return RunSpec.model_validate({"model": model, "stages": {"count": stages}})


def weights_of(spec: RunSpec, seed: int = 0) -> list[torch.Tensor]:
    """Of each stage; spread out, so that no two tokens are nearly as likely."""
    found = []
    for stage, layers in enumerate(stage_ranges(spec)):
        layout = stage_layout(spec, layers)
        flat = genesis(spec, layout)
        generator = torch.Generator().manual_seed(100 * seed + stage)
        flat[: layout.decayed] = 0.3 * torch.randn(layout.decayed, generator=generator)
        found.append(flat)
    return found


async def in_place(function: Callable[..., Any], *arguments: Any) -> Any:
    """Virtual time has no threads."""
    return function(*arguments)


@dataclass
class Peer:
    """One server."""

    name: PeerId
    stage: int
    transport: Transport
    server: SessionServer
    versions: Versions
    killed: bool = False

    @property
    def computed(self) -> int:
        """Positions, of all sessions."""
        return self.server.engine.figures.positions


class World:
    """All servers; also the membership that clients see (`Replicas`). Use as `async with`."""

    def __init__(
        self,
        spec: RunSpec,
        replicas: int,
        *,
        duration_s: float = 0.005,
        budget_bytes: int = 512 << 20,
        wrap: Callable[[Transport], Transport] = lambda transport: transport,
        link: Link | None = None,
    ) -> None:
        self.spec = spec
        self.network = MemoryNetwork(random.Random(1), link)
        self.client = self.network.transport(
            PeerId("12D3KooWclient".ljust(52, "1")), frozenset({Role.INFERENCE})
        )
        self.suspected: list[tuple[PeerId, str]] = []
        self.slower: dict[PeerId, float] = {}  # how many times longer a batch takes there
        self.claims: dict[PeerId, float] = {}  # a step, where that is not what a server measures
        self.hidden: set[PeerId] = set()  # from clients
        self.strangers: dict[int, list[PeerId]] = {}  # that clients think are servers
        self.introduced: set[tuple[PeerId, PeerId]] = set()  # a server, and whose record a client sent it
        self.weights = weights_of(spec)
        self.watched: Generation | None = None
        self.peers = [
            self._peer(stage, number, duration_s, budget_bytes, wrap)
            for stage in range(spec.stages.count)
            for number in range(replicas)
        ]

    def _peer(
        self,
        stage: int,
        number: int,
        duration_s: float,
        budget_bytes: int,
        wrap: Callable[[Transport], Transport],
    ) -> Peer:
        name = PeerId(f"12D3KooWs{stage}r{number}".ljust(52, "1"))
        transport = wrap(self.network.transport(name, frozenset({Role.TRAINER})))
        versions = Versions(Form.of(self.spec, stage_layout(self.spec, stage_ranges(self.spec)[stage])))
        versions.publish(b"v1".ljust(32), self.weights[stage])
        server = SessionServer(
            self.spec,
            stage,
            stage_layout(self.spec, stage_ranges(self.spec)[stage]),
            transport=transport,
            lane=InlineLane(lambda kind: duration_s * self.slower.get(name, 1.0)),
            versions=versions,
            budget_bytes=budget_bytes,
            introduced=lambda peer, signed: self._introduce(name, peer, signed),
        )
        TuningServer(
            self.spec,
            stage,
            server._layout,
            transport=transport,
            lane=server.engine._lane,
            versions=versions,
            device="cpu",
        ).serve()
        server.serve()
        return Peer(name, stage, transport, server, versions)

    def _introduce(self, server: PeerId, peer: PeerId, signed: SignedRecord) -> None:
        if signed.record != peer.encode():
            raise RecordInvalid(f"not the record of {peer}")
        self.introduced.add((server, peer))

    async def __aenter__(self) -> World:
        await self.client.start()
        for peer in self.peers:
            await peer.transport.start()
        self._tasks = {peer.name: asyncio.create_task(peer.server.run()) for peer in self.peers}
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        for peer in self.peers:
            await peer.transport.close()
        await self.client.close()

    def generation(
        self,
        prompt: Sequence[int] = PROMPT,
        count: int = 64,
        options: SamplingOptions = GREEDY,
        seed: int = 1,
        **more: Any,
    ) -> Generation:
        rng = random.Random(seed)
        return Generation(self.spec, self.client, self, prompt, count, options, rng, **more)

    async def text(self, *arguments: object, **more: object) -> list[int]:
        """A whole text."""
        async with self.generation(*arguments, **more) as generation:  # type: ignore[arg-type]
            return [token async for token in generation]

    def kill(self, peer: Peer) -> None:
        """The process is gone."""
        peer.killed = True
        self.network.kill(peer.name)
        self._tasks[peer.name].cancel()

    def leave(self, peer: Peer) -> None:
        """It stops to serve, and stays connected."""
        self._tasks[peer.name].cancel()

    def used(self, stage: int) -> Peer:
        """The server of a stage that `watched` uses now."""
        assert self.watched is not None
        name = self.watched.route()[stage]
        return next(peer for peer in self.peers if peer.name == name)

    def computed(self, stage: int) -> int:
        """Positions, by all servers of a stage."""
        return sum(peer.computed for peer in self.peers if peer.stage == stage)

    # --- Replicas

    def of_stage(self, stage: int) -> Sequence[Replica]:
        own = [
            Replica(
                peer.name,
                0.002,
                step_s=self.claims.get(peer.name, peer.server.engine.claimed_step_s()),
            )
            for peer in self.peers
            if peer.stage == stage and peer.name not in self.hidden
        ]
        return [*own, *(Replica(name, 0.002) for name in self.strangers.get(stage, ()))]

    def suspect(self, peer: PeerId, reason: str) -> None:
        self.suspected.append((peer, reason))

    def is_gone(self, peer: PeerId) -> bool:
        return False

    async def meet(self, peer: PeerId, chain: Sequence[PeerId]) -> None:
        return

    def record_of(self, peer: PeerId) -> SignedRecord | None:
        return SignedRecord(peer.encode(), bytes(64))

    def has_departed(self, peer: PeerId, incarnation: int | None = None) -> bool:
        return False

    async def changed(self) -> None:
        await asyncio.sleep(0.1)


def reference(world: World, prompt: Sequence[int] = PROMPT, count: int = 64) -> list[int]:
    """The greedy text."""
    return greedy(world.spec, world.weights, prompt, count)


def greedy(spec: RunSpec, weights: Sequence[torch.Tensor], prompt: Sequence[int], count: int) -> list[int]:
    """The greedy text, computed without a cache by the training model."""
    tokens = list(prompt)
    models = [StageModel(spec, stage_layout(spec, layers)) for layers in stage_ranges(spec)]
    for _ in range(count):
        hidden = models[0].embed(weights[0], torch.tensor([tokens]))
        for model, flat in zip(models, weights, strict=True):
            hidden = model.blocks(flat, hidden, None)
        tokens.append(int(models[-1].logits(weights[-1], hidden[:, -1:], None).argmax()))
    return tokens[len(prompt) :]


def one_stage(spec: RunSpec, seed: int = 0) -> tuple[RunSpec, torch.Tensor]:
    """The spec for all layers in one stage, and `weights_of` as one vector."""
    whole = spec.model_copy(update={"stages": spec.stages.model_copy(update={"count": 1})})
    layout = stage_layout(whole, range(spec.model.layers))
    weights, slots = torch.zeros(layout.size), {slot.name: slot for slot in layout.slots}
    for flat, layers in zip(weights_of(spec, seed), stage_ranges(spec), strict=True):
        for slot in stage_layout(spec, layers).slots:
            slots[slot.name].view(weights).copy_(slot.view(flat))
    return whole, weights


def draft_of(world: World, noise: float = 0.0) -> DraftModel:
    """The world's own model, its weights shaken by some noise; 1 ms for each run of guesses."""
    spec, weights = one_stage(world.spec)
    weights += noise * torch.randn(len(weights), generator=torch.Generator().manual_seed(1))
    return DraftModel(spec, weights, InlineLane(lambda kind: 0.001))
