"""The next stage, as one thing that answers: ask a replica, hedge once, retry elsewhere.

Used by the driver and by every hop but the last. Recovery is local: the caller keeps its output until it has
the gradient, so only the direct caller of a replica that fails retries, and retries never multiply. Backward
stays with the replica that did the forward, since it is the answer to the same call.

Who is asked in place of a replica that failed hears who was behind that one, and adopts them: it runs its own
forward, and then takes over the gradient that they have or are at. That gradient is of the failed replica's
output, whose weights differ by some inner steps; what that costs, tests/benchmarks/adoption.py measures.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from shoal.protocol.errors import Busy, NotHere, PeerSilent, ShoalError, Stale, Superseded
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.training.decisions import DecisionLog
from shoal.training.lane import Lane
from shoal.training.pipeline.attempt import WORKING_EVERY_S, Answer, Attempt, Journey, Pick
from shoal.training.pipeline.compute import Boundary
from shoal.training.pipeline.messages import Adopt, Link, MicroBatch, Propagate
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.pipeline.replicas import Replicas
from shoal.training.pipeline.successors import Event, Successors

HEDGE_SHARE = 0.05  # hedges for each answer: what lies past the 95th percentile
HEDGES_SAVED = 4.0  # the most that may come at once; a slow stage must not be asked for everything twice
HEDGES_AT_FIRST = 1.0  # before answers tell what is usual: all may be slow to begin
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Errand:
    """What the next stage is asked for."""

    micro_batch: MicroBatch
    chain: tuple[Link, ...]  # so far, the driver first
    sequences: int
    boundary: Boundary
    deadline: float  # loop time
    journey: Journey
    adopt: tuple[Link, ...] = ()  # from the next stage on: who may have it already
    again: bool = False  # a replica of a stage before failed with it


@dataclass(slots=True)
class _Runner:
    """One of the attempts at an errand."""

    attempt: Attempt
    expected_s: float
    task: asyncio.Task[Answer]


class Downstream:
    """See the module."""

    def __init__(
        self,
        stages: range,
        transport: Transport,
        replicas: Replicas,
        form: PayloadFormat,
        lane: Lane,
        rng: random.Random,
        event: Event,
        decisions: DecisionLog | None = None,
    ) -> None:
        """`stages`: the next one and all behind it; an answer's chain has a link for each."""
        self.stage = stages.start
        self.successors = Successors(self.stage, replicas, form, lane, rng, event, decisions)
        self._stages = stages
        self._transport = transport
        self._replicas = replicas
        self._form = form
        self._rng = rng
        self._event = event
        self._hedges_saved = HEDGES_AT_FIRST
        self.hedges = 0
        self.adopted = 0  # micro-batches whose chain behind a dead hop was taken over

    async def propagate(self, errand: Errand, use: Callable[[Answer], Awaitable[T]]) -> tuple[Answer, T]:
        """Ask until a replica answers, and what `use` made of the answer: the caller's backward.

        MessageInvalid from `use` counts against the replica, as no answer would, and another one is asked.
        Raises StageEmpty or PeerSilent after the deadline, MessageInvalid if there is nothing fit to send.
        """
        loop, journey = asyncio.get_running_loop(), errand.journey
        failed_at: float | None = None
        adopting, behind = bool(errand.adopt), errand.adopt[1:]
        while True:
            now = loop.time()
            if now >= errand.deadline:
                number = errand.micro_batch.number
                raise PeerSilent(f"stage {self.stage} gave no gradient of {number} in time")
            runner, adopting = self._adopt(errand) if adopting else None, False
            if runner is None:
                again = errand.again or failed_at is not None
                pick = await self.successors.room(errand.sequences, errand.deadline, again=again)
                payload = await errand.boundary.payload(pick.codec)
                runner = self._start(errand, pick, payload, behind, again=again)
            try:
                winner, answer = await self._race(errand, runner)
                try:
                    used = await use(answer)
                except ShoalError as error:
                    journey.behind = answer.chain
                    self.successors.failed(winner.attempt, error)
                    raise
            except Busy:
                continue
            except ShoalError as error:
                if isinstance(error, Superseded) or journey.orphaned:  # nobody waits here: ask nobody else
                    raise Stale(f"stage {self.stage} is not asked again: {error}") from error
                if _finds_nothing(runner.attempt, error):
                    continue
                failed_at = failed_at if failed_at is not None else loop.time()
                behind, journey.behind = journey.behind[1:] or behind, ()
                continue
            journey.behind = answer.chain
            self._hedges_saved = min(HEDGES_SAVED, self._hedges_saved + HEDGE_SHARE)
            if winner.attempt.adopts:
                self.adopted += 1
                told: dict[str, object] = {"stage": self.stage, "peer": winner.attempt.peer}
                self._event("adopt", {**told, "micro_batch": errand.micro_batch.number})
            else:
                self.successors.answered(winner.attempt, answer, winner.expected_s)
            if failed_at is not None:
                seconds = loop.time() - failed_at
                told = {"stage": self.stage, "to": winner.attempt.peer, "seconds": seconds}
                self._event("reroute", {**told, "asked_s": max(0.0, winner.attempt.sent_s - failed_at)})
            return answer, used

    async def _race(self, errand: Errand, first: _Runner) -> tuple[_Runner, Answer]:
        """The first answer, of one replica or, should that stall, of two. Raises the last one's failure."""
        runners = [first]
        stall = asyncio.create_task(runners[0].attempt.stalled.wait())
        telling: list[asyncio.Task[None]] = []
        try:
            while True:
                waiting: set[asyncio.Task[Any]] = {runner.task for runner in runners}
                if not stall.done():
                    waiting.add(stall)
                look_again_s = WORKING_EVERY_S if stall.done() and len(runners) == 1 else None
                await asyncio.wait(waiting, timeout=look_again_s, return_when=asyncio.FIRST_COMPLETED)
                for runner in [runner for runner in runners if runner.task.done()]:
                    error = runner.task.exception()
                    if error is None:
                        for loser in runners:
                            if loser is not runner:
                                loser.attempt.unwanted = True
                                self.successors.outrun(loser.attempt)
                        return runner, runner.task.result()
                    runners.remove(runner)
                    self.successors.ended(runner.attempt)
                    if not isinstance(error, ShoalError):
                        raise error
                    taken = isinstance(error, Superseded) and errand.journey.orphaned
                    if not taken and not _finds_nothing(runner.attempt, error):
                        self.successors.failed(runner.attempt, error)
                    if not runners:
                        raise error
                if stall.done() and len(runners) == 1 and (other := await self._hedge(errand, runners[0])):
                    runners.append(other)
                    telling.append(asyncio.create_task(runners[0].attempt.tell_hedge()))
        finally:
            tasks = [stall, *telling, *(runner.task for runner in runners)]
            for task in tasks:
                task.cancel()
            try:
                await asyncio.gather(*tasks, return_exceptions=True)
            finally:  # whoever is cancelled while the other one parts: no place may stay taken for good
                for runner in runners:
                    self.successors.ended(runner.attempt)

    async def _hedge(self, errand: Errand, stalled: _Runner) -> _Runner | None:
        """A second attempt, if this chain and this caller still have one to give, and somebody has room."""
        if errand.journey.hedged or self._hedges_saved < 1.0 or not stalled.attempt.is_late():
            return None
        pick = self.successors.pick(errand.sequences, besides=(stalled.attempt.peer,))
        if pick is None:
            return None
        errand.journey.hedged = True
        self._hedges_saved -= 1.0
        self.hedges += 1
        told: dict[str, object] = {"stage": self.stage, "peer": stalled.attempt.peer, "to": pick.peer}
        self._event("hedge", {**told, "micro_batch": errand.micro_batch.number})
        return self._start(errand, pick, await errand.boundary.payload(pick.codec))

    def _adopt(self, errand: Errand) -> _Runner | None:
        """Ask the replica that may have it already, if it is known here as one of the next stage."""
        if not errand.adopt:
            return None
        link = errand.adopt[0]
        pick = self.successors.named(PeerId(link.peer), errand.sequences)
        if pick is None:
            return None
        number, journey = errand.micro_batch, errand.journey
        request = Adopt(number, self.stage, link.attempt, errand.chain, journey.hedged)
        return self._run(errand, pick, request, memoryview(b""))

    def _start(
        self,
        errand: Errand,
        pick: Pick,
        payload: memoryview,
        adopt: tuple[Link, ...] = (),
        *,
        again: bool = False,
    ) -> _Runner:
        left_s = errand.deadline - asyncio.get_running_loop().time()
        request = Propagate(
            errand.micro_batch,
            self.stage,
            self._rng.getrandbits(64),
            errand.chain,
            errand.sequences,
            max(left_s, 0.0),
            pick.codec,
            errand.journey.hedged,
            adopt,
            again,
        )
        return self._run(errand, pick, request, payload)

    def _run(self, errand: Errand, pick: Pick, request: Propagate | Adopt, payload: memoryview) -> _Runner:
        passed = functools.partial(self.successors.passed, pick.peer)
        gone = functools.partial(self._replicas.is_gone, pick.peer)
        hedge_after_s = functools.partial(self.successors.hedge_after_s, pick, errand.sequences)
        attempt = Attempt(
            self._transport, request, self._stages, errand.journey, pick, passed, gone, hedge_after_s
        )
        self.successors.began(attempt)
        errand.journey.behind = (Link(self.stage, pick.peer, request.attempt),)
        gradient_bytes = functools.partial(self._form.hidden_bytes, errand.sequences)
        task = asyncio.create_task(attempt.run(payload, gradient_bytes, errand.deadline))
        return _Runner(attempt, pick.expected_s, task)


def _finds_nothing(attempt: Attempt, error: ShoalError) -> bool:
    """Whether there was nothing (left) to adopt: no failure of the replica that says so."""
    return attempt.adopts and isinstance(error, NotHere)
