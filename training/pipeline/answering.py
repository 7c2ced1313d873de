"""How a hop answers a caller's stream: Working as long as it takes, then the gradient. Used by `Hop`."""

from __future__ import annotations

import asyncio
from typing import Any

from shoal.protocol.errors import ShoalError, Stale, StreamEnded, Superseded
from shoal.protocol.transport import Stream
from shoal.training.lane import Lane
from shoal.training.pipeline.attempt import WORKING_EVERY_S, Journey
from shoal.training.pipeline.jobs import Job, Jobs, Seat
from shoal.training.pipeline.messages import Activations, Adopted, Gradient, HedgeSpent, Link, Working


class Answering:
    """See the module."""

    def __init__(self, lane: Lane, jobs: Jobs) -> None:
        self._lane = lane
        self._jobs = jobs

    async def attend(self, stream: Stream, job: Job, greeting: Adopted | None = None) -> None:
        """Answer this caller, if no other one takes the job over."""
        seat = job.seat
        listening = asyncio.create_task(self._listen(stream, job, seat))
        try:
            if greeting is not None:
                await stream.send(greeting)
            await self.while_working(stream, job.journey, job.work, seat)
            if seat.done():
                raise Superseded(f"micro-batch {job.key[0].number} has been taken over by {job.caller}")
            if job.work.cancelled():
                raise Stale(f"micro-batch {job.key[0].number} is wanted by nobody any more")
            done = job.work.result()
            job.told = True
            load = self._lane.load()
            held_s = asyncio.get_running_loop().time() - done.received
            figures = (load.backlog_s, load.service_s, held_s, done.waited_s)
            await stream.send(Gradient(done.chain, done.loss, *figures))
            await stream.send(Activations(), done.gradient)
        finally:
            self._jobs.leave(job, seat)
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def while_working(self, stream: Stream, journey: Journey, *awaited: asyncio.Future[Any]) -> None:
        """Tell the caller Working until one of these is done."""
        told: tuple[Link, ...] = ()
        while True:
            await asyncio.wait(awaited, timeout=WORKING_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
            if any(future.done() for future in awaited):
                return
            behind, finished = journey.behind, self._lane.load().finished
            news = behind if self._jobs.adopts and behind != told else ()
            await stream.send(Working(journey.stage, finished, journey.hedged, news))
            told = behind

    async def _listen(self, stream: Stream, job: Job, seat: Seat) -> None:
        """Whatever the caller still says: an END before the answer is there means that nobody wants it."""
        try:
            while True:
                await stream.receive(HedgeSpent)
                job.journey.hedged = True
        except StreamEnded:
            self._jobs.unwanted(job, seat)
        except ShoalError:
            return  # it is gone; somebody may take its place
