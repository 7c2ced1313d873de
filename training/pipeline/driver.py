"""The driver: feeds micro-batches of its data stream through chains, decides them, and commits.

Several micro-batches are in flight at once. When the driver has its gradient it applies its own part: that
is the decision. Then it tells every hop of the chain directly, in parallel, until each has acknowledged.
At a one-stage run the chain is the driver alone and the code the same.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import torch

from shoal.protocol.errors import ShoalError
from shoal.protocol.faults import define
from shoal.protocol.faulty_transport import point
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Stream, Transport
from shoal.training.activation import held_most
from shoal.training.lane import Lane
from shoal.training.methods import at_stage
from shoal.training.pipeline.attempt import Answer, Journey
from shoal.training.pipeline.commits import Commits
from shoal.training.pipeline.compute import Boundary, Passage, StageCompute
from shoal.training.pipeline.downstream import Downstream, Errand
from shoal.training.pipeline.hop import ADDING, STEPPED, TRAINERS
from shoal.training.pipeline.ledger import Ledger
from shoal.training.pipeline.messages import (
    APPLIED,
    TENTATIVE,
    UNKNOWN,
    CommitChain,
    Link,
    MicroBatch,
    QueryChain,
    Verdict,
)
from shoal.training.pipeline.replicas import Replicas
from shoal.training.pipeline.successors import Event
from shoal.training.spec import RunSpec
from shoal.training.work import Work

_DECIDED = define("chain.decided")
_SMOOTHING = 0.05
_AGAIN_S, _AGAIN_MOST_S = (0.1, 0.5), 8.0  # before another chain, twice as long after each one that failed

NextBatch = Callable[[], Awaitable[torch.Tensor]]  # tokens int64 [B, T+1]


@dataclass(slots=True)
class DriverFigures:
    """What a driver has measured."""

    tokens: int = 0
    loss: float = math.nan  # moving average, nats a token
    last_loss: float = math.nan
    chain_s: float = 0.0  # moving average of one micro-batch, forward to decision
    restarted: int = 0  # micro-batches begun again after their chain failed


class Driver:
    """The data side of a first-stage replica."""

    def __init__(
        self,
        spec: RunSpec,
        *,
        me: PeerId,
        incarnation: int,
        transport: Transport,
        replicas: Replicas,
        compute: StageCompute,
        lane: Lane,
        ledger: Ledger,
        downstream: Downstream | None,
        stepped: Callable[[], None],
        event: Event,
        rng: random.Random,
        added: Callable[[torch.Tensor, bool], None] = lambda tokens, stepped: None,
        stages: int = 1,
    ) -> None:
        """`added` hears of each micro-batch's tokens when they count, and whether that made an inner step.
        `stages`: that this peer may hold."""
        self._spec = spec
        self._in_flight_most = spec.inner.in_flight
        if spec.limits.activation_bytes:
            self._in_flight_most = min(spec.inner.in_flight, held_most(spec, 0, stages))
        self.me = me
        self._incarnation = incarnation
        self._transport = transport
        self._replicas = replicas
        self._compute = compute
        self._lane = lane
        self._ledger = ledger
        self._downstream = downstream
        self._stepped = stepped
        self._event = event
        self._rng = rng
        self._added = added
        self._number = 0
        self._undecided: set[MicroBatch] = set()
        self.commits = Commits(transport, replicas, spec.limits.undecided_ttl_s, rng, event)
        self._running = asyncio.Event()
        self._running.set()
        self._progress = asyncio.Event()  # pulsed when a micro-batch is decided or given up
        self._leaving = False
        self.figures = DriverFigures()

    def serve(self) -> None:
        """Register with the transport; before it starts."""
        self._transport.serve(at_stage(0, "commit"), self._query, TRAINERS)

    def pause(self) -> None:
        """Begin no further micro-batch; those in flight finish."""
        self._running.clear()

    def resume(self) -> None:
        if not self._leaving:
            self._running.set()

    async def drained(self) -> None:
        """Begin nothing more; returns when all is decided or given up, and commits are acknowledged.

        Given up is what would need another chain: undecided, it counts at no stage.
        """
        self.pause()
        self._leaving = True
        if self._downstream is not None:
            self._downstream.successors.leave()
        while self._undecided:
            self._progress.clear()
            await self._progress.wait()
        await self.commits.settled(leaving=True)

    @property
    def in_flight(self) -> int:
        return len(self._undecided)

    async def run(self, next_batch: NextBatch) -> None:
        """Train until cancelled, `in_flight` micro-batches at a time."""
        try:
            if self._spec.inner.mode == "flush":
                await self._flush(next_batch)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self._in_flight_most):
                    tasks.create_task(self._feed(next_batch))
        finally:
            await self.commits.close()

    async def _flush(self, next_batch: NextBatch) -> None:
        """A step's micro-batches, then drain, for ever."""
        group = math.ceil(self._spec.inner.inner_tokens / self._spec.micro_batch_tokens)
        while True:
            await self.train([await next_batch() for _ in range(group)])

    async def train(self, batches: list[torch.Tensor]) -> None:
        """Take these micro-batches through, at most `in_flight` at a time; returns with all acknowledged."""
        slots = asyncio.Semaphore(self._in_flight_most)

        async def one(tokens: torch.Tensor) -> None:
            async with slots:
                await self._may_begin()
                await self._micro_batch(tokens)

        async with asyncio.TaskGroup() as tasks:
            for tokens in batches:
                tasks.create_task(one(tokens))
        await self.commits.settled()

    async def _feed(self, next_batch: NextBatch) -> None:
        while True:
            tokens = await next_batch()
            await self._may_begin()
            await self._micro_batch(tokens)

    async def _may_begin(self) -> None:
        while not self._running.is_set():  # it may have been cleared since the event woke this task
            await self._running.wait()

    async def _micro_batch(self, tokens: torch.Tensor) -> None:
        """One micro-batch to its decision, however many chains that takes; its commits go on behind."""
        micro_batch = MicroBatch(self.me, self._incarnation, self._number)
        self._number += 1
        self._undecided.add(micro_batch)
        begun, pause_s = asyncio.get_running_loop().time(), self._rng.uniform(*_AGAIN_S)
        try:
            while True:
                try:
                    await self._through_chain(micro_batch, tokens, begun)
                    return
                except ShoalError as error:
                    if self._leaving:
                        self._event("given-up", {"micro_batch": micro_batch.number, "reason": str(error)})
                        return
                    self.figures.restarted += 1
                    self._event("restart", {"micro_batch": micro_batch.number, "reason": str(error)})
                    await asyncio.sleep(min(pause_s, _AGAIN_MOST_S * self._rng.uniform(0.5, 1.0)))
                    pause_s *= 2.0
        finally:
            self._undecided.discard(micro_batch)
            self._progress.set()

    async def _through_chain(self, micro_batch: MicroBatch, tokens: torch.Tensor, begun: float) -> None:
        """Forward, chain, backward; then the decision: the chain hears of it, and our own weight gradient."""
        own = Link(0, self.me, 0)
        passage = Passage(tokens)

        boundary = Boundary(self._compute, self._lane, passage)

        def forward() -> None:
            self._compute.forward(passage)
            if self._downstream is not None:
                boundary.prepare(self._downstream.successors.usual_codec)

        async def backward(answer: Answer | None) -> float:
            gradient, arrived = (None, "") if answer is None else (answer.gradient, answer.codec)
            run = self._lane.run(Work.BACKWARD, self._compute.backward, passage, gradient, arrived, "")
            return (await run)[1]

        try:
            await self._lane.run(Work.FORWARD, forward)
            chain: tuple[Link, ...] = (own,)
            if self._downstream is not None:
                deadline = asyncio.get_running_loop().time() + self._spec.limits.hop_timeout_s
                errand = Errand(micro_batch, chain, tokens.shape[0], boundary, deadline, Journey(1))
                answer, _ = await self._downstream.propagate(errand, backward)
                chain, loss = (own, *answer.chain), answer.loss
            else:
                loss = await backward(None)
        except BaseException:
            self._lane.post(self._compute.drop, passage)
            raise
        self._ledger.apply(micro_batch, chain, passage.token_count)
        self._record(passage.token_count, loss, asyncio.get_running_loop().time() - begun)
        await point(self._transport, _DECIDED)
        await self.commits.deliver(CommitChain(micro_batch, chain))
        await point(self._transport, ADDING)
        stepped = await self._lane.run(Work.WEIGHT, self._compute.add, passage)
        self._added(tokens, stepped)
        if stepped:
            await point(self._transport, STEPPED)
            self._stepped()

    def _record(self, tokens: int, loss: float, chain_s: float) -> None:
        figures = self.figures
        known_s = figures.chain_s
        figures.chain_s = chain_s if known_s == 0.0 else known_s + _SMOOTHING * (chain_s - known_s)
        figures.tokens += tokens
        figures.last_loss = loss / tokens
        if math.isnan(figures.loss):
            figures.loss = figures.last_loss
        figures.loss += _SMOOTHING * (figures.last_loss - figures.loss)

    async def _query(self, stream: Stream) -> None:
        """A hop asks what became of a micro-batch of ours."""
        message = await stream.receive(QueryChain)
        micro_batch, asker = message.header.micro_batch, (stream.remote.peer, message.header.stage)
        if self._ledger.has(micro_batch):
            chain = self._ledger.chain(micro_batch)
            if any((link.peer, link.stage) == asker for link in chain):
                self.commits.asked(micro_batch, asker)
            await stream.send(Verdict(APPLIED, chain))
        else:
            await stream.send(Verdict(TENTATIVE if micro_batch in self._undecided else UNKNOWN, ()))
