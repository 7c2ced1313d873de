"""One replica's part in everybody's micro-batches: answer `propagate`, remember, apply on commit.

A hop forwards, asks the next stage, answers its caller with the input gradient, and then holds the weight
gradient `undecided` until the driver's commit.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

from shoal.protocol.errors import Busy, MessageInvalid, NotHere, Stale
from shoal.protocol.faults import define
from shoal.protocol.faulty_transport import point
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Channel, Stream, Transport
from shoal.training.activation import held_most
from shoal.training.lane import Lane
from shoal.training.methods import at_stage
from shoal.training.pipeline.answering import Answering
from shoal.training.pipeline.attempt import Answer, Journey
from shoal.training.pipeline.compute import Boundary, Passage, StageCompute
from shoal.training.pipeline.downstream import Downstream, Errand
from shoal.training.pipeline.jobs import Done, Job, Jobs
from shoal.training.pipeline.ledger import Ledger
from shoal.training.pipeline.messages import (
    Activations,
    Adopt,
    Adopted,
    CommitChain,
    Link,
    Propagate,
    QueryChain,
    begins,
    spans,
)
from shoal.training.pipeline.replicas import Replicas
from shoal.training.pipeline.routing import busy_for_s, waiting_since
from shoal.training.pipeline.settlement import admits
from shoal.training.pipeline.successors import Event
from shoal.training.pipeline.undecided import Undecided
from shoal.training.spec import RunSpec
from shoal.training.work import Work

TRAINERS = frozenset({Role.TRAINER, Role.OWNER})
ADDING, STEPPED = define("gradient.adding"), define("step.made")
log = logging.getLogger(__name__)


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
        stages: int = 1,
    ) -> None:
        """`stages`: that this peer may hold."""
        self._limits = spec.limits
        self._held_most = held_most(spec, stage, stages)
        self._largest_micro_batch = spec.inner.micro_batch_sequences
        self.stage = stage
        self._behind = range(stage + 1, spec.stages.count)
        self.me = me
        self._transport = transport
        self._replicas = replicas
        self._compute = compute
        self._lane = lane
        self._ledger = ledger
        self._downstream = downstream
        self._stepped = stepped
        self._event = event
        self._progress = asyncio.Event()  # pulsed when something held here is settled
        self._undecided = Undecided(
            stage,
            me,
            spec.limits.undecided_ttl_s,
            transport,
            replicas,
            ledger,
            self._start_applying,
            lambda key: self.jobs.released(key),
            event,
        )
        self.jobs = Jobs(
            self._undecided,
            ledger,
            lambda: lane.load().service_s,
            self._progress.set,
            adopts=spec.inner.adopt,
        )
        self._answering = Answering(lane, self.jobs)
        self._arriving: set[Journey] = set()  # admitted, not on the lane yet
        self._applying: set[asyncio.Task[None]] = set()
        self.draining = False

    def serve(self) -> None:
        """Register with the transport; before it starts."""
        self._transport.serve(at_stage(self.stage, "propagate"), self._propagate, TRAINERS, Channel.BULK)
        self._transport.serve(at_stage(self.stage, "commit"), self._commit, TRAINERS)

    @property
    def undecided(self) -> int:
        return len(self._undecided)

    async def run(self) -> None:
        """Settle what stays undecided; until cancelled."""
        try:
            while True:
                await asyncio.sleep(1.0)
                await self._undecided.settle()
        finally:
            self.draining = True
            await self.jobs.close()
            for task in self._applying:
                task.cancel()
            await asyncio.gather(*self._applying, return_exceptions=True)

    async def _propagate(self, stream: Stream) -> None:
        request: Propagate | Adopt = (await stream.receive(Propagate, Adopt)).header
        caller = stream.remote.peer
        self._check(request, caller)
        if isinstance(request, Adopt):
            self._admit_adopter(caller)
            job = self.jobs.adopt(request, caller)
            await self._answering.attend(stream, job, Adopted(job.codec))
        else:
            await self._answering.attend(stream, await self._take_on(stream, request, caller))

    async def _take_on(self, stream: Stream, request: Propagate, caller: PeerId) -> Job:
        """Take the activations, and begin to work on them."""
        begun = asyncio.get_running_loop().time()
        age_s = self._limits.hop_timeout_s - request.deadline_s  # of the whole chain's time
        since = waiting_since(begun, age_s, self._lane.load().service_s, request.again)
        self._admit(request, caller, since)
        journey = Journey(self.stage, request.hedged)
        form, sequences = self._compute.format, request.sequences
        size = form.token_bytes(sequences) + form.hidden_bytes(sequences, request.codec)
        self.jobs.arrives(caller)
        self._arriving.add(journey)
        arrival = asyncio.create_task(stream.receive(Activations, max_payload_bytes=size))
        try:
            await self._answering.while_working(stream, journey, arrival)
            payload = arrival.result().payload
            work = self._work(request, payload, journey, begun, since)
            return self.jobs.begin(request, caller, journey, work)
        except BaseException:
            arrival.cancel()
            await asyncio.gather(arrival, return_exceptions=True)
            raise
        finally:
            self._arriving.discard(journey)
            self.jobs.arrived(caller)

    def _check(self, request: Propagate | Adopt, caller: PeerId) -> None:
        """Refuse what is malformed, for another stage, or applied already."""
        if request.stage != self.stage:
            raise Stale(f"asked for stage {request.stage}, this peer holds stage {self.stage}")
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

    def _admit_adopter(self, caller: PeerId) -> None:
        """Only a replica of the stage before may take a dead one's place."""
        if all(replica.peer != caller for replica in self._replicas.of_stage(self.stage - 1)):
            raise NotHere(f"{caller} is not known here as a replica of stage {self.stage - 1}")

    def _admit(self, request: Propagate, caller: PeerId, since: float) -> None:
        """Refuse what does not fit this run, or the memory and the queue here."""
        if request.sequences > self._largest_micro_batch:
            raise MessageInvalid(
                f"{request.sequences} sequences, the run's micro-batches have {self._largest_micro_batch}"
            )
        if not begins(request.adopt, self._behind):
            raise MessageInvalid(
                f"hops to adopt must be of stages {self.stage + 1}, {self.stage + 2} and so on"
            )
        self._admit_memory(caller)
        load = self._lane.load(before=since)
        younger_s = self._lane.load().backlog_s - load.backlog_s
        queued = load.queued + len(self._arriving)
        backlog_s = load.backlog_s + len(self._arriving) * load.service_s
        if (busy_s := busy_for_s(queued, backlog_s, load.service_s, younger_s)) > 0.0:
            raise Busy(f"has {backlog_s:.1f} s of work queued", retry_after_s=busy_s)

    def _admit_memory(self, caller: PeerId) -> None:
        held = self.jobs.working.total() + len(self._undecided) + len(self._applying)
        of_caller = self.jobs.working[caller] + self._undecided.of_caller(caller)
        if self.draining or not admits(of_caller, held, self._held_most):
            raise Busy(
                f"holds {held} micro-batches, {of_caller} of this caller",
                retry_after_s=min(max(self._lane.load().backlog_s / 2, 0.05), 5.0),
            )

    async def _work(
        self, request: Propagate, payload: memoryview, journey: Journey, begun: float, since: float
    ) -> Done:
        """Forward, the next stage, input gradient. Gives back everything if it fails or is cancelled."""
        loop, sequences = asyncio.get_running_loop(), request.sequences
        received = loop.time()
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
            await self._lane.run(Work.FORWARD, forward, payload, since=since)
            del payload
            forwarded = loop.time()
            if self._downstream is None:
                gradient, loss = await backward(None)
                total_loss = loss
            else:
                journey.stage = self.stage + 1
                deadline = begun + min(request.deadline_s, self._limits.hop_timeout_s)
                whole = (*request.chain, *chain)
                errand = Errand(
                    request.micro_batch,
                    whole,
                    sequences,
                    boundary,
                    deadline,
                    journey,
                    request.adopt,
                    request.again,
                )
                answer, (gradient, loss) = await self._downstream.propagate(errand, backward)
                chain, total_loss = (*chain, *answer.chain), answer.loss
            if not math.isfinite(loss):
                raise MessageInvalid(
                    f"micro-batch {request.micro_batch.number} overflows at stage {self.stage}: its "
                    "activations are too large; the weights of a stage before may have diverged"
                )
        except BaseException:
            self._lane.post(self._compute.drop, passage)
            raise
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
            self._undecided.decide(request.micro_batch, request.chain)
        await stream.send(self._undecided.verdict(request.micro_batch, stream.remote.peer))

    def _start_applying(self, passage: Passage) -> None:
        task = asyncio.create_task(self._apply(passage))
        self._applying.add(task)
        task.add_done_callback(self._applied)

    def _applied(self, task: asyncio.Task[None]) -> None:
        self._applying.discard(task)
        self._progress.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a committed micro-batch could not be applied", exc_info=error)

    async def _apply(self, passage: Passage) -> None:
        await point(self._transport, ADDING)
        if await self._lane.run(Work.WEIGHT, self._compute.add, passage):
            await point(self._transport, STEPPED)
            self._stepped()

    async def drained(self) -> None:
        """Returns when nothing is held, computed or being applied; admission must be closed before."""
        while self.jobs.working or len(self._undecided) or self._applying:
            self._progress.clear()
            await self._progress.wait()
