"""One server of each stage and a client in one process, each server with a lane of its own.

Used by `inference.py` over real sockets, and by `inference_draft.py` over the memory transport.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from shoal.dht.directory import SignedRecord
from shoal.node.loop import LoopMeter, new_loop
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.training.lane import ThreadLane
from shoal.training.model.layout import stage_layout
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.replicas import Replica
from shoal.training.serving.chain import Generation
from shoal.training.serving.draft import DraftModel
from shoal.training.serving.messages import SamplingOptions
from shoal.training.serving.server import SessionServer
from shoal.training.serving.versions import Versions
from shoal.training.serving.written import ChainFigures
from shoal.training.spec import RunSpec

GREEDY = SamplingOptions()
T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """On the loop that daemons run on."""
    with asyncio.Runner(loop_factory=lambda: new_loop(LoopMeter())) as runner:
        return runner.run(main)


@dataclass(frozen=True)
class Text:
    """A text, when it was begun and when each of its tokens came, and what became of its chain."""

    tokens: list[int]
    times_s: list[float]
    figures: ChainFigures

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.times_s[1] - self.times_s[0]

    @property
    def each_s(self) -> list[float]:
        """Of the tokens after the first."""
        return [late - soon for soon, late in itertools.pairwise(self.times_s[1:])]


class Swarm:
    """Use as `async with`; also the membership that the client sees."""

    def __init__(
        self,
        spec: RunSpec,
        weights: Sequence[torch.Tensor],
        client: Transport,
        transports: Sequence[Transport],
    ) -> None:
        """`weights` and `transports` by stage; transports are started and closed by the caller."""
        self._spec, self._client, self._transports = spec, client, transports
        self._lanes = [ThreadLane() for _ in transports]
        self._servers = []
        for stage, layers in enumerate(stage_ranges(spec)):
            versions = Versions()
            versions.publish(bytes(32), weights[stage])
            server = SessionServer(
                spec,
                stage,
                stage_layout(spec, layers),
                transport=transports[stage],
                lane=self._lanes[stage],
                versions=versions,
                budget_bytes=512 << 20,
            )
            server.serve()
            self._servers.append(server)

    async def __aenter__(self) -> Swarm:
        self._tasks = [asyncio.create_task(server.run()) for server in self._servers]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for lane in self._lanes:
            await lane.close()

    async def write(
        self,
        prompt: list[int],
        count: int,
        seed: int = 0,
        draft: DraftModel | None = None,
        options: SamplingOptions = GREEDY,
    ) -> Text:
        """`count` tokens after the prompt."""
        rng, tokens = random.Random(seed), list[int]()
        times = [time.perf_counter()]
        generation = Generation(self._spec, self._client, self, prompt, count, options, rng, draft=draft)
        async with generation:
            async for token in generation:
                tokens.append(token)
                times.append(time.perf_counter())
        return Text(tokens, times, generation.figures)

    # --- Replicas

    def of_stage(self, stage: int) -> list[Replica]:
        return [Replica(self._transports[stage].me, 0.001)]

    def suspect(self, peer: PeerId, reason: str) -> None:
        print(f"suspected: {peer}: {reason}", file=sys.stderr)

    def is_gone(self, peer: PeerId) -> bool:
        return False

    async def meet(self, peer: PeerId, chain: Sequence[PeerId]) -> None:
        return

    def record_of(self, peer: PeerId) -> SignedRecord | None:
        return None

    def has_departed(self, peer: PeerId, incarnation: int | None = None) -> bool:
        return False

    async def changed(self) -> None:
        await asyncio.sleep(0.1)
