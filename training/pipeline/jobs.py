"""The micro-batches that a hop has taken on, each from its activations to its decision.

A job outlives its caller. When that dies, the hops behind it go on, or keep their answers; the replica that
takes its place finds them by the chain that Working told, and attaches to the first of them (`Adopt`), so
that nothing behind a dead hop is computed again. A job answers one caller at a time: the last that attached.
Who is left behind and adopted by nobody gives up after a while; who was told (END on its stream) that nobody
wants it, at once, and tells those behind it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from shoal.protocol.errors import NotHere
from shoal.protocol.identity import PeerId
from shoal.training.pipeline.attempt import Journey
from shoal.training.pipeline.compute import Passage
from shoal.training.pipeline.ledger import Ledger
from shoal.training.pipeline.messages import Adopt, Link, MicroBatch, Propagate
from shoal.training.pipeline.undecided import Undecided

ORPHAN_S = 5.0  # silence is noticed after two; the rest is for finding a replacement ...
ORPHAN_SERVICES = 4.0  # ... which queues, and runs its forward first
Seat = asyncio.Future[None]


@dataclass(slots=True, eq=False)
class Done:
    """What a hop has to answer."""

    passage: Passage
    chain: tuple[Link, ...]  # from here on
    loss: float  # of the last stage
    gradient: memoryview
    received: float  # loop time at which the activations had arrived
    waited_s: float  # for the stages behind


@dataclass(slots=True, eq=False)
class Job:
    """One attempt."""

    key: tuple[MicroBatch, int]
    codec: str  # of its answer
    caller: PeerId
    before: tuple[Link, ...]  # the hops before this one
    journey: Journey
    work: asyncio.Task[Done]
    seat: Seat = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Whose stream waits for it; done once another has taken the place."""
    told: bool = False  # its caller may have the answer: then its driver decides, and nobody else
    expiry: asyncio.TimerHandle | None = None


class Jobs:
    """See the module."""

    def __init__(
        self,
        undecided: Undecided,
        ledger: Ledger,
        service_s: Callable[[], float],
        progressed: Callable[[], None],
        *,
        adopts: bool,
    ) -> None:
        """`service_s`: lane time of a micro-batch here; `progressed` is called when a job ends or is done.

        Unless it `adopts`, a job ends with its caller.
        """
        self.adopts = adopts
        self._undecided = undecided
        self._ledger = ledger
        self._service_s = service_s
        self._progressed = progressed
        self._jobs: dict[tuple[MicroBatch, int], Job] = {}
        self._working: set[Job] = set()
        self.working: Counter[PeerId] = Counter()  # not answered yet, by caller; those that arrive included

    def arrives(self, caller: PeerId) -> None:
        """Admitted; its activations are on their way."""
        self.working[caller] += 1

    def arrived(self, caller: PeerId) -> None:
        """They are here, or come no more."""
        self.working[caller] -= 1
        self.working += Counter()  # forgets callers at zero
        self._progressed()

    def begin(
        self, request: Propagate, caller: PeerId, journey: Journey, work: Coroutine[None, None, Done]
    ) -> Job:
        """Work on it, and hold it undecided when that is done."""
        key = (request.micro_batch, request.attempt)
        if (former := self._jobs.get(key)) is not None:
            former.told = False
            self.end(former)
        task = asyncio.create_task(work)
        job = Job(key, request.codec, caller, request.chain, journey, task)
        self._jobs[key] = job
        self._working.add(job)
        self.working[caller] += 1
        task.add_done_callback(lambda task: self._worked(job, task))
        return job

    def adopt(self, request: Adopt, caller: PeerId) -> Job:
        """The job now answers `caller`. Raises NotHere."""
        job = self._jobs.get((request.micro_batch, request.attempt))
        if not self.adopts or job is None or job.before[0] != request.chain[0]:
            raise NotHere(
                f"micro-batch {request.micro_batch.number} is not under way here in that attempt (any more)"
            )
        self._stay(job)
        if not job.seat.done():
            job.seat.set_result(None)
        job.seat = asyncio.get_running_loop().create_future()
        if job in self._working:
            self.working[caller] += 1
            self.arrived(job.caller)
        else:
            self._undecided.reroute(job.key, caller, (*request.chain, *job.work.result().chain))
        job.caller, job.before = caller, request.chain
        job.journey.hedged |= request.hedged
        job.journey.orphaned = False
        return job

    def leave(self, job: Job, seat: Seat) -> None:
        """A stream is over; if nobody else has taken the seat, the job waits for whoever may want it.

        Nobody takes a driver's place.
        """
        if job.seat is not seat or self._jobs.get(job.key) is not job:
            return
        job.journey.orphaned = True
        if job.told:
            return
        if not self.adopts or job.caller == job.key[0].driver:
            self.end(job)
            return
        wait_s = ORPHAN_S + ORPHAN_SERVICES * self._service_s()
        job.expiry = asyncio.get_running_loop().call_later(wait_s, self.end, job)

    def unwanted(self, job: Job, seat: Seat) -> None:
        """Whoever has that seat says that nobody wants the job."""
        if job.seat is seat:
            self.end(job)

    def end(self, job: Job) -> None:
        """Give up what nobody can have an answer of, and tell those behind."""
        if job.told or self._jobs.get(job.key) is not job:
            return
        self._forget(job)
        job.journey.unwanted = True
        if not job.work.done():
            job.work.cancel()
        else:
            self._undecided.abandon(job.key)

    def released(self, key: tuple[MicroBatch, int]) -> None:
        """It is decided, or given up: its answer is of no use to anybody any more."""
        if (job := self._jobs.get(key)) is not None:
            self._forget(job)
        self._progressed()

    async def close(self) -> None:
        """This hop ends, without a word to those behind it: somebody may take its place."""
        for job in list(self._jobs.values()):
            self._forget(job)
            job.work.cancel()
        await asyncio.gather(*(job.work for job in self._working), return_exceptions=True)

    def _worked(self, job: Job, task: asyncio.Task[Done]) -> None:
        self._working.discard(job)
        here = self._jobs.get(job.key) is job
        if task.cancelled() or task.exception() is not None:
            self._ledger.abandoned += 1
            if here:
                self._forget(job)
        elif here:
            done = task.result()
            micro_batch, attempt = job.key
            self._undecided.hold(micro_batch, attempt, done.passage, job.caller, (*job.before, *done.chain))
        else:  # given up in the very moment
            self._ledger.abandoned += 1
        self.arrived(job.caller)

    def _forget(self, job: Job) -> None:
        del self._jobs[job.key]
        self._stay(job)

    def _stay(self, job: Job) -> None:
        if job.expiry is not None:
            job.expiry.cancel()
            job.expiry = None
