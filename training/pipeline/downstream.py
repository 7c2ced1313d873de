"""The next stage, as one thing that answers: ask a replica, hedge once, retry elsewhere.

Used by the driver and by every hop but the last. Recovery is local: the caller keeps its output until it has
the gradient, so only the direct caller of a replica that fails retries, and retries never multiply. Backward
stays with the replica that did the forward, since it is the answer to the same call.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from shoal.protocol.errors import Busy, PeerSilent, ShoalError
from shoal.protocol.transport import Transport
from shoal.training.decisions import DecisionLog
from shoal.training.lane import Lane
from shoal.training.pipeline.attempt import Answer, Attempt, Journey, Pick
from shoal.training.pipeline.compute import Boundary
from shoal.training.pipeline.messages import Link, MicroBatch, Propagate
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.pipeline.replicas import Replicas
from shoal.training.pipeline.successors import Event, Successors

HEDGE_SHARE = 0.05  # hedges for each answer: what lies past the 95th percentile
HEDGES_SAVED = 4.0  # the most that may come at once; a slow stage must not be asked for everything twice
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
        self._form = form
        self._rng = rng
        self._event = event
        self._hedges_saved = HEDGES_SAVED
        self.hedges = 0

    async def propagate(self, errand: Errand, use: Callable[[Answer], Awaitable[T]]) -> tuple[Answer, T]:
        """Ask until a replica answers, and what `use` made of the answer: the caller's backward.

        MessageInvalid from `use` counts against the replica, as no answer would, and another one is asked.
        Raises StageEmpty or PeerSilent after the deadline, MessageInvalid if there is nothing fit to send.
        """
        loop = asyncio.get_running_loop()
        failed_at: float | None = None
        while True:
            now = loop.time()
            if now >= errand.deadline:
                number = errand.micro_batch.number
                raise PeerSilent(f"stage {self.stage} gave no gradient of {number} in time")
            pick = self.successors.pick(errand.sequences)
            if pick is None:
                await self.successors.room(now, errand.deadline)
                continue
            payload = await errand.boundary.payload(pick.codec)
            try:
                winner, answer = await self._race(errand, pick, payload)
                try:
                    used = await use(answer)
                except ShoalError as error:
                    self.successors.failed(winner.attempt, error)
                    raise
            except Busy:
                continue
            except ShoalError:
                failed_at = failed_at if failed_at is not None else loop.time()
                continue
            self.successors.answered(winner.attempt, answer, winner.expected_s)
            self._hedges_saved = min(HEDGES_SAVED, self._hedges_saved + HEDGE_SHARE)
            if failed_at is not None:
                seconds = loop.time() - failed_at
                self._event("reroute", {"stage": self.stage, "to": winner.attempt.peer, "seconds": seconds})
            return answer, used

    async def _race(self, errand: Errand, pick: Pick, payload: memoryview) -> tuple[_Runner, Answer]:
        """The first answer, of one replica or, should that stall, of two. Raises the last one's failure."""
        runners = [self._start(errand, pick, payload)]
        stall = asyncio.create_task(runners[0].attempt.stalled.wait())
        telling: list[asyncio.Task[None]] = []
        try:
            while True:
                waiting: set[asyncio.Task[Any]] = {runner.task for runner in runners}
                if not stall.done():
                    waiting.add(stall)
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for runner in [runner for runner in runners if runner.task.done()]:
                    error = runner.task.exception()
                    if error is None:
                        for loser in runners:
                            if loser is not runner:
                                self.successors.outrun(loser.attempt)
                        return runner, runner.task.result()
                    runners.remove(runner)
                    self.successors.ended(runner.attempt)
                    if not isinstance(error, ShoalError):
                        raise error
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
            await asyncio.gather(*tasks, return_exceptions=True)
            for runner in runners:
                self.successors.ended(runner.attempt)

    async def _hedge(self, errand: Errand, stalled: _Runner) -> _Runner | None:
        """A second attempt, if this chain and this caller still have one to give, and somebody has room."""
        if errand.journey.hedged or self._hedges_saved < 1.0:
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

    def _start(self, errand: Errand, pick: Pick, payload: memoryview) -> _Runner:
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
        )
        passed = functools.partial(self.successors.passed, pick.peer)
        attempt = Attempt(self._transport, request, self._stages, errand.journey, pick, passed)
        self.successors.began(attempt)
        gradient_bytes = self._form.hidden_bytes(errand.sequences, pick.codec)
        task = asyncio.create_task(attempt.run(payload, gradient_bytes, errand.deadline))
        return _Runner(attempt, pick.expected_s, task)
