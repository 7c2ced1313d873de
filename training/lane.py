"""The compute lane: one worker for one device, a queue by kind of work, backward before forward (`work.py`).

Whoever computes asks the lane. `ThreadLane` runs a worker thread; `InlineLane` is its twin for the simulator:
work runs on the loop and then takes its declared duration of virtual time.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from shoal.training.work import LEAST_WAITING, SHARE, Durations, LaneLoad, Queues, Work

T = TypeVar("T")


class Lane(ABC):
    """One device's worker. Queues are bounded by the callers' admission, not here.

    `weights_waiting`: weight gradients that stay behind forwards; `Station` sets it from the spec.
    """

    weights_waiting = LEAST_WAITING

    @abstractmethod
    async def run(
        self, kind: Work, function: Callable[..., T], *arguments: Any, since: float | None = None
    ) -> T:
        """The function's result, computed in its turn. Cancelling the caller withdraws work not begun.

        `since`: loop time from which on it counts as waiting; now, if not given.
        """

    @abstractmethod
    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run it after whatever runs now, without waiting for it: to give back what cancelled work took."""

    @abstractmethod
    def load(self, before: float = math.inf) -> LaneLoad:
        """The present load; of what is queued, what goes before work of its kind that waits since then."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what runs, refuse the rest."""


@dataclass(slots=True)
class _Job:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    future: asyncio.Future[Any]


class ThreadLane(Lane):
    """A worker thread with one queue for each kind of work."""

    def __init__(
        self,
        name: str = "lane",
        least_s: Callable[[Work], float] = lambda kind: 0.0,
        share: float = SHARE,
    ) -> None:
        """`least_s`: a piece of work takes at least so long; the rest of it the thread sleeps (`paced`).
        `share`: of the lane's time for serving, from 0 to 1, while training would use all of it."""
        self._least_s = least_s
        self._queues: Queues[_Job] = Queues()
        self._wake = threading.Condition()
        self._closed = False
        self._durations = Durations(share)
        self._running: tuple[Work, float] | None = None  # since when, on the performance counter
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(
        self, kind: Work, function: Callable[..., T], *arguments: Any, since: float | None = None
    ) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        with self._wake:
            if self._closed:
                raise RuntimeError("the lane is closed")
            since = self._loop.time() if since is None else since
            self._queues.add(kind, since, _Job(function, arguments, future))
            self._wake.notify()
        return await future

    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        with self._wake:
            if not self._closed:
                future: asyncio.Future[object] = self._loop.create_future()
                self._queues.add(Work.UPDATE, self._loop.time(), _Job(function, arguments, future))
                self._wake.notify()

    def load(self, before: float = math.inf) -> LaneLoad:
        running = self._running
        now_runs = None if running is None else (running[0], time.perf_counter() - running[1])
        with self._wake:
            waiting = self._queues.waiting(before)
        return self._durations.load(waiting, now_runs)

    async def close(self) -> None:
        with self._wake:
            self._closed = True
            for job in self._queues.clear():
                job.future.cancel()
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _next(self) -> tuple[Work, _Job] | None:
        with self._wake:
            while True:
                found = self._queues.pop(self._durations.serving_is_due, self.weights_waiting)
                if found is not None:
                    return found
                if self._closed:
                    return None
                self._wake.wait()

    def _work(self) -> None:
        while (found := self._next()) is not None:
            kind, job = found
            if job.future.cancelled():
                continue
            begin = time.perf_counter()
            self._running = kind, begin
            try:
                outcome, failure = job.function(*job.arguments), None
            except BaseException as error:  # the edge of the worker: the caller gets it, and decides
                outcome, failure = None, error
            if (rest_s := self._least_s(kind) - (time.perf_counter() - begin)) > 0:
                time.sleep(rest_s)
            self._running = None
            self._durations.record(kind, time.perf_counter() - begin)
            if not self._closed or not self._loop.is_closed():
                self._loop.call_soon_threadsafe(_settle, job.future, outcome, failure)
            del job, found, outcome, failure  # tensors must not outlive their turn


def _settle(future: asyncio.Future[Any], outcome: object, failure: BaseException | None) -> None:
    if future.done():
        return
    if failure is None:
        future.set_result(outcome)
    elif isinstance(failure, Exception) and not isinstance(failure, StopIteration):
        future.set_exception(failure)
    else:  # no future takes a StopIteration, and the others would end the loop
        future.set_exception(RuntimeError(f"a job of the lane ended with {failure!r}"))


class InlineLane(Lane):
    """The twin for virtual time: same order, durations declared instead of measured."""

    def __init__(
        self, duration_s: Callable[[Work], float] = lambda kind: 0.001, share: float = SHARE
    ) -> None:
        self._duration_s = duration_s
        self._queues: Queues[asyncio.Future[None]] = Queues()
        self._busy = False
        self._running: tuple[Work, float] | None = None  # since when, in loop time
        self._durations = Durations(share)

    async def run(
        self, kind: Work, function: Callable[..., T], *arguments: Any, since: float | None = None
    ) -> T:
        loop = asyncio.get_running_loop()
        if self._busy:
            turn: asyncio.Future[None] = loop.create_future()
            self._queues.add(kind, loop.time() if since is None else since, turn)
            try:
                await turn
            except asyncio.CancelledError:
                if not self._queues.remove(kind, turn) and turn.done() and not turn.cancelled():
                    self._hand_over()
                raise
        self._busy = True
        seconds = self._duration_s(kind)
        begin = loop.time()
        self._running = kind, begin
        try:
            await asyncio.sleep(seconds)
            return function(*arguments)
        finally:  # at once; for a caller that gave up, when a thread would be through with it
            loop.call_at(begin + seconds, self._finished, kind, seconds)

    def _finished(self, kind: Work, seconds: float) -> None:
        self._running = None
        self._durations.record(kind, seconds)
        self._hand_over()

    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        function(*arguments)  # functions run whole on the loop: none can be running now

    def load(self, before: float = math.inf) -> LaneLoad:
        running = self._running
        now_runs = None if running is None else (running[0], asyncio.get_running_loop().time() - running[1])
        return self._durations.load(self._queues.waiting(before), now_runs)

    async def close(self) -> None:
        for turn in self._queues.clear():
            turn.cancel()

    def _hand_over(self) -> None:
        while (found := self._queues.pop(self._durations.serving_is_due, self.weights_waiting)) is not None:
            if not found[1].done():
                found[1].set_result(None)
                return  # stays busy: the turn is taken
        self._busy = False
