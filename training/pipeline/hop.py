"""One replica's part in everybody's micro-batches: answer `propagate`, remember, apply on commit.

A hop forwards, asks the next stage, answers its caller with the input gradient, and then holds the weight
gradient undecided until the driver's commit. Left undecided, it asks the other hops of the chain: one that
applied this very chain settles it; a driver that is gone or decided otherwise lets it drop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from shoal.protocol.errors import Busy, MessageInvalid, NetworkError, ShoalError, Stale
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Stream, Transport, call
from shoal.training.lane import Lane, Work
from shoal.training.pipeline.attempt import WORKING_EVERY_S, Answer, Journey
from shoal.training.pipeline.compute import Boundary, Passage, StageCompute
from shoal.training.pipeline.downstream import Downstream, Errand
from shoal.training.pipeline.ledger import Ledger
from shoal.training.pipeline.messages import (
    APPLIED,
    TENTATIVE,
    UNKNOWN,
    Activations,
    CommitChain,
    Gradient,
    HedgeSpent,
    Link,
    MicroBatch,
    Propagate,
    QueryChain,
    Verdict,
    Working,
    spans,
)
from shoal.training.pipeline.replicas import Replicas
from shoal.training.pipeline.routing import busy_for_s
from shoal.training.pipeline.successors import Event
from shoal.training.spec import RunSpec

TRAINERS = frozenset({Role.TRAINER, Role.OWNER})
_ASK_AFTER_S = 3.0  # a commit is one message behind the answer; by now it is late
_QUERY_TIMEOUT_S = 2.0
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Undecided:
    """A micro-batch answered, not committed yet."""

    passage: Passage
    chain: tuple[Link, ...]
    since: float  # loop time
    asked: float


@dataclass(slots=True, eq=False)
class Done:
    """What a hop has to answer."""

    passage: Passage
    chain: tuple[Link, ...]  # from here on
    loss: float  # of the last stage
    gradient: memoryview
    received: float  # loop time at which the activations had arrived
    waited_s: float  # for the stages behind


class Hop:
    """The serving side of the pipeline at one replica of a stage other than the first."""

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        *,
        me: PeerId,
        transport: Transport,
        replicas: Replicas,
        compute: StageCompute,
        lane: Lane,
        ledger: Ledger,
        downstream: Downstream | None,
        stepped: Callable[[], None],
        event: Event,
    ) -> None:
        self._limits = spec.limits
        self._largest_micro_batch = spec.inner.micro_batch_sequences
        self.stage = stage
        self.me = me
        self._transport = transport
        self._replicas = replicas
        self._compute = compute
        self._lane = lane
        self._ledger = ledger
        self._downstream = downstream
        self._stepped = stepped
        self._event = event
        self._undecided: dict[tuple[MicroBatch, int], Undecided] = {}
        self._working = 0
        self._applying: set[asyncio.Task[None]] = set()
        self._progress = asyncio.Event()  # pulsed when something held here is settled
        self.draining = False

    def serve(self) -> None:
        """Register with the transport; before it starts."""
        self._transport.serve("propagate", self._propagate, TRAINERS)
        self._transport.serve("commit", self._commit, TRAINERS)

    @property
    def undecided(self) -> int:
        return len(self._undecided)

    async def run(self) -> None:
        """Settle what stays undecided; until cancelled."""
        try:
            while True:
                await asyncio.sleep(1.0)
                await self.settle()
        finally:
            for task in self._applying:
                task.cancel()
            await asyncio.gather(*self._applying, return_exceptions=True)

    async def _propagate(self, stream: Stream) -> None:
        request: Propagate = (await stream.receive(Propagate)).header
        self._admit(request, stream.remote.peer)
        journey = Journey(self.stage, request.hedged)
        self._working += 1
        try:
            done = await self._while_working(stream, journey, self._work(stream, request, journey))
        finally:
            self._working -= 1
            self._progress.set()
        now, load = asyncio.get_running_loop().time(), self._lane.load()
        self._undecided[(request.micro_batch, request.attempt)] = Undecided(
            done.passage, (*request.chain, *done.chain), now, now
        )
        held_s, waited_s = now - done.received, done.waited_s
        await stream.send(Gradient(done.chain, done.loss, load.backlog_s, load.service_s, held_s, waited_s))
        await stream.send(Activations(), done.gradient)

    def _admit(self, request: Propagate, caller: PeerId) -> None:
        """Refuse what is malformed, for another stage, applied already, or beyond the memory granted."""
        if request.stage != self.stage:
            raise Stale(f"asked for stage {request.stage}, this peer holds stage {self.stage}")
        if request.sequences > self._largest_micro_batch:
            raise MessageInvalid(
                f"{request.sequences} sequences, the run's micro-batches have {self._largest_micro_batch}"
            )
        chain = request.chain
        ends = (request.micro_batch.driver, caller)
        if not spans(chain, range(self.stage)) or (chain[0].peer, chain[-1].peer) != ends:
            raise MessageInvalid(
                f"the chain so far must lead from driver {ends[0]} over stages 0 to {self.stage - 1} to its "
                f"caller {caller}; {len(chain)} links came that do not"
            )
        if self._ledger.has(request.micro_batch):
            self._ledger.duplicates_refused += 1
            raise Stale(f"micro-batch {request.micro_batch.number} is applied here already")
        held, load = self._working + len(self._undecided), self._lane.load()
        if self.draining or held >= self._limits.undecided_micro_batches:
            raise Busy(f"holds {held} micro-batches", retry_after_s=min(max(load.backlog_s / 2, 0.05), 5.0))
        if (busy_s := busy_for_s(load.backlog_s, load.service_s)) > 0.0:
            raise Busy(f"has {load.backlog_s:.1f} s of work queued", retry_after_s=busy_s)

    async def _work(self, stream: Stream, request: Propagate, journey: Journey) -> Done:
        """Forward, the next stage, input gradient. Gives back everything if it fails or is cancelled."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        form, sequences = self._compute.format, request.sequences
        size = form.token_bytes(sequences) + form.hidden_bytes(sequences, request.codec)
        message = await stream.receive(Activations, max_payload_bytes=size)
        received = loop.time()
        listening = asyncio.create_task(_listen(stream, journey))
        passage = Passage()
        boundary = Boundary(self._compute, self._lane, passage)
        chain: tuple[Link, ...] = (Link(self.stage, self.me, request.attempt),)
        forwarded, waited_s = received, 0.0

        def forward(payload: memoryview) -> None:
            self._compute.receive(passage, payload, sequences, request.codec)
            if self._downstream is not None:
                boundary.prepare(self._downstream.successors.usual_codec)

        async def backward(answer: Answer | None) -> tuple[memoryview, float]:
            nonlocal waited_s
            journey.stage, waited_s = self.stage, loop.time() - forwarded
            gradient, arrived = (None, "") if answer is None else (answer.gradient, answer.codec)
            return await self._lane.run(
                Work.BACKWARD, self._compute.backward, passage, gradient, arrived, request.codec
            )

        try:
            await self._lane.run(Work.FORWARD, forward, message.payload)
            del message
            forwarded = loop.time()
            if self._downstream is None:
                gradient, loss = await backward(None)
                total_loss = loss
            else:
                journey.stage = self.stage + 1
                deadline = begun + min(request.deadline_s, self._limits.hop_timeout_s)
                whole = (*request.chain, *chain)
                errand = Errand(request.micro_batch, whole, sequences, boundary, deadline, journey)
                answer, (gradient, loss) = await self._downstream.propagate(errand, backward)
                chain, total_loss = (*chain, *answer.chain), answer.loss
            if not math.isfinite(loss):
                raise MessageInvalid(
                    f"micro-batch {request.micro_batch.number} overflows at stage {self.stage}: its "
                    "activations are too large; the weights of a stage before may have diverged"
                )
        except BaseException:
            self._lane.post(self._compute.drop, passage)
            self._ledger.dropped += 1
            raise
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        return Done(passage, chain, total_loss, gradient, received, waited_s)

    async def _commit(self, stream: Stream) -> None:
        """Both CommitChain (decides) and QueryChain (asks); answered with what holds here now."""
        message = await stream.receive(CommitChain, QueryChain)
        request: CommitChain | QueryChain = message.header
        if isinstance(request, CommitChain):
            if stream.remote.peer != request.micro_batch.driver:
                raise MessageInvalid(
                    f"a commit of {request.micro_batch.driver}'s micro-batch came from {stream.remote.peer}; "
                    "only its driver decides it"
                )
            self._decide(request.micro_batch, request.chain)
        await stream.send(self.verdict(request.micro_batch))

    def verdict(self, micro_batch: MicroBatch) -> Verdict:
        """What this replica knows of a micro-batch."""
        if self._ledger.has(micro_batch):
            return Verdict(APPLIED, self._ledger.chain(micro_batch))
        tentative = any(key[0] == micro_batch for key in self._undecided)
        return Verdict(TENTATIVE if tentative else UNKNOWN, ())

    def _decide(self, micro_batch: MicroBatch, chain: tuple[Link, ...]) -> None:
        """Apply the attempt that `chain` names; drop this micro-batch's other attempts. Idempotent."""
        attempts = [key for key in self._undecided if key[0] == micro_batch]
        for key in attempts:
            undecided = self._undecided.pop(key)
            if Link(self.stage, self.me, key[1]) not in chain:
                self._ledger.dropped += 1
                self._progress.set()
            elif self._ledger.apply(micro_batch, chain, undecided.passage.token_count):
                task = asyncio.create_task(self._apply(undecided.passage))
                self._applying.add(task)
                task.add_done_callback(self._applied)

    def _applied(self, task: asyncio.Task[None]) -> None:
        self._applying.discard(task)
        self._progress.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a committed micro-batch could not be applied", exc_info=error)

    async def _apply(self, passage: Passage) -> None:
        if await self._lane.run(Work.WEIGHT, self._compute.add, passage):
            self._stepped()

    async def settle(self) -> None:
        """Ask the other hops about everything undecided for long; drop what nobody will decide."""
        now = asyncio.get_running_loop().time()
        due = [(key, item) for key, item in self._undecided.items() if now - item.asked >= _ASK_AFTER_S]
        for key, item in due:
            item.asked = now
            await self._settle(key, item)

    async def _settle(self, key: tuple[MicroBatch, int], item: Undecided) -> None:
        micro_batch, attempt = key
        own = Link(self.stage, self.me, attempt)
        driver_gone = self._replicas.has_departed(PeerId(micro_batch.driver), micro_batch.incarnation)
        driver_waits = False  # it is still on the way to its decision: however long that takes, hold on
        for link in item.chain:
            if link.peer == self.me or self._replicas.is_gone(PeerId(link.peer)):
                continue
            with contextlib.suppress(ShoalError):
                reply = await call(
                    self._transport,
                    PeerId(link.peer),
                    "commit",
                    QueryChain(micro_batch),
                    Verdict,
                    timeout_s=_QUERY_TIMEOUT_S,
                )
                verdict: Verdict = reply.header
                if verdict.decision == APPLIED and own in verdict.chain:
                    self._decide(micro_batch, verdict.chain)
                    return
                driver_waits |= link.peer == micro_batch.driver and verdict.decision == TENTATIVE
                decided_elsewhere = verdict.decision == APPLIED and verdict.chain
                forgotten = link.peer == micro_batch.driver and verdict.decision == UNKNOWN
                if decided_elsewhere or forgotten:
                    driver_gone = True  # for our purposes: no commit of this attempt will ever come
                    break
        age_s = asyncio.get_running_loop().time() - item.since
        hopeless = driver_gone or (age_s >= self._limits.undecided_ttl_s and not driver_waits)
        if hopeless and self._undecided.pop(key, None) is not None:
            self._ledger.dropped += 1
            self._progress.set()
            self._event("dropped", {"micro_batch": micro_batch.number, "driver": micro_batch.driver})

    async def _while_working(self, stream: Stream, journey: Journey, work: Awaitable[T]) -> T:
        """The result of `work`, telling the caller Working as long as it takes."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=WORKING_EVERY_S))[0]:
                finished = self._lane.load().finished
                await stream.send(Working(journey.stage, finished, journey.hedged))
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, NetworkError):
                    await task

    async def drained(self) -> None:
        """Returns when nothing is held, computed or being applied; admission must be closed before."""
        while self._working or self._undecided or self._applying:
            self._progress.clear()
            await self._progress.wait()


async def _listen(stream: Stream, journey: Journey) -> None:
    """Whatever the caller still says while this hop works."""
    with contextlib.suppress(ShoalError):
        await stream.receive(HedgeSpent)
        journey.hedged = True
