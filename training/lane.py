"""The compute lane: one worker for one device, a queue by kind of work, backward before forward.

Whoever computes asks the lane. `ThreadLane` runs a worker thread; `InlineLane` is its twin for the simulator:
work runs on the loop and then takes its declared duration of virtual time.

Weight gradients yield to forwards, since nobody waits for them; once `weights_waiting` of them queue up they
go first, or a busy stage would never step and their activations would fill memory. Serving fills the gaps of
training, and of a lane that trains without a pause it takes its share of the time (`--inference-share`).
"""

from __future__ import annotations

import asyncio
import enum
import statistics
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
# Weight gradients in stock. Simulation of 1,000 peers, mean of three seeds: 0.856 of the ideal rate with 2
# and 0.887 with 6 (a replica full at two micro-batches); 0.898 with 8, 0.906 with 12 (full at four)
_LEAST_WAITING, _MOST_WAITING = 2, 12
SHARE = 0.125  # of a busy lane that inference and scoring may take, where nobody says another
_CREDIT_S = 0.5  # of a share that was not used stays so much: a burst, after which training is left alone
_RECENT = (
    5  # pieces of a kind whose median is its usual duration: the first ones import, allocate and compile
)
_LEAST_LEFT = 0.1  # of its usual duration, counted as left of work that runs longer than that


class Work(enum.IntEnum):
    """Kinds of work, most urgent first."""

    UPDATE = 0
    BACKWARD = 1
    FORWARD = 2
    WEIGHT = 3
    SERVE = 4


_OF_MICRO_BATCH = (Work.FORWARD, Work.BACKWARD, Work.WEIGHT)


@dataclass(frozen=True, slots=True)
class LaneLoad:
    """What heartbeats and status tell about a lane."""

    queued: int
    backlog_s: float  # time to finish what runs and is queued, and the backward that follows a forward
    finished: int  # pieces of work since the start: stands still when the lane does
    busy_s: float
    service_s: float  # what a micro-batch takes of the lane, forward to weight gradient; 0: unknown
    served_s: float  # of `busy_s`: inference and scoring


def paced(micro_batch_s: float, served_s: float = 0.0) -> Callable[[Work], float]:
    """Least durations that make a micro-batch take so long: a third each for forward and both backwards.

    `served_s`: of a piece of serving. Speed tests declare them well above the CPU's cost, so that two cores
    can stand for eight machines.
    """
    least_s = {
        kind: micro_batch_s / len(_OF_MICRO_BATCH) if kind in _OF_MICRO_BATCH else 0.0 for kind in Work
    }
    return {**least_s, Work.SERVE: served_s}.__getitem__


def weights_in_stock(in_flight: int) -> int:
    """How many weight gradients may wait for a gap; their activations are held meanwhile.

    Half of what a driver has in flight, of which the plan counts the memory.
    """
    return max(_LEAST_WAITING, min(in_flight // 2, _MOST_WAITING))


def next_kind(
    waiting: Sequence[int], serving_is_due: bool = False, weights_waiting: int = _LEAST_WAITING
) -> Work | None:
    """Which queue to serve, given how many wait in each (by Work's order). Pure.

    `serving_is_due`: one more piece of it stays within its share.
    """
    if waiting[Work.SERVE] and serving_is_due and not waiting[Work.UPDATE]:
        return Work.SERVE
    if waiting[Work.WEIGHT] >= weights_waiting and not waiting[Work.UPDATE] and not waiting[Work.BACKWARD]:
        return Work.WEIGHT
    return next((kind for kind in Work if waiting[kind]), None)


class _Durations:
    """How long each kind takes of late."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._credit_s = 0.0  # share · (all that ran) − serving
        self.usual_s = [0.0] * len(Work)
        self._assumed_s = [0.0] * len(Work)  # where nothing is known, what a piece of a micro-batch takes
        self._whole_s = [0.0] * len(Work)  # with what follows: the backward and the weight gradient
        self._recent: tuple[deque[float], ...] = tuple(deque(maxlen=_RECENT) for _ in Work)
        self._weight_ratios: deque[float] = deque(maxlen=_RECENT)  # to a backward: weights may wait for long
        self.finished = 0
        self.busy_s = self.served_s = 0.0

    def record(self, kind: Work, seconds: float) -> None:
        self._recent[kind].append(seconds)
        self.usual_s[kind] = statistics.median_low(self._recent[kind])
        backward_s = self.usual_s[Work.BACKWARD]
        if kind is Work.WEIGHT and backward_s:
            self._weight_ratios.append(seconds / backward_s)
        if self._weight_ratios:
            self.usual_s[Work.WEIGHT] = statistics.median_low(self._weight_ratios) * backward_s
        self._assume()
        self.finished += 1
        self.busy_s += seconds
        self.served_s += seconds if kind is Work.SERVE else 0.0
        earned_s = self._share * seconds - (seconds if kind is Work.SERVE else 0.0)
        self._credit_s = min(max(self._credit_s + earned_s, -_CREDIT_S), _CREDIT_S)

    @property
    def serving_is_due(self) -> bool:
        """Whether a piece of serving, as long as usual, stays within the share."""
        usual_s = self.usual_s[Work.SERVE] or self._typical_s()
        return self._share > 0.0 and self._credit_s >= min((1.0 - self._share) * usual_s, _CREDIT_S)

    def _typical_s(self) -> float:
        """Of a piece of a micro-batch, for kinds that have yet to come."""
        known = [self.usual_s[kind] for kind in _OF_MICRO_BATCH if self.usual_s[kind]]
        return sum(known) / len(known) if known else 0.0

    def _assume(self) -> None:
        typical_s = self._typical_s()
        self._assumed_s = [
            usual or (typical_s if kind in _OF_MICRO_BATCH else 0.0)
            for kind, usual in enumerate(self.usual_s)
        ]
        whole_s = [*self._assumed_s]
        whole_s[Work.BACKWARD] += whole_s[Work.WEIGHT]
        whole_s[Work.FORWARD] += whole_s[Work.BACKWARD]
        self._whole_s = whole_s  # at once: the loop reads it while the lane's thread records

    def load(self, waiting: Sequence[int], running: tuple[Work, float] | None) -> LaneLoad:
        """`running`: the kind of what runs, and since how many seconds."""
        whole_s = self._whole_s
        backlog_s = sum(count * seconds for count, seconds in zip(waiting, whole_s, strict=True))
        if running is not None:  # never zero: a lane that hangs in a piece of work has a backlog
            kind, since_s = running
            backlog_s += whole_s[kind] - min(since_s, (1 - _LEAST_LEFT) * self._assumed_s[kind])
        service_s = whole_s[Work.FORWARD]
        return LaneLoad(sum(waiting), backlog_s, self.finished, self.busy_s, service_s, self.served_s)


class Lane(ABC):
    """One device's worker. Queues are bounded by the callers' admission, not here.

    `weights_waiting`: weight gradients that stay behind forwards; `Station` sets it from the spec.
    """

    weights_waiting = _LEAST_WAITING

    @abstractmethod
    async def run(self, kind: Work, function: Callable[..., T], *arguments: Any) -> T:
        """The function's result, computed in its turn. Cancelling the caller withdraws work not begun."""

    @abstractmethod
    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run it after whatever runs now, without waiting for it: to give back what cancelled work took."""

    @abstractmethod
    def load(self) -> LaneLoad:
        """The present load."""

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
        self._queues: tuple[deque[_Job], ...] = tuple(deque() for _ in Work)
        self._wake = threading.Condition()
        self._closed = False
        self._durations = _Durations(share)
        self._running: tuple[Work, float] | None = None  # since when, on the performance counter
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, kind: Work, function: Callable[..., T], *arguments: Any) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        with self._wake:
            if self._closed:
                raise RuntimeError("the lane is closed")
            self._queues[kind].append(_Job(function, arguments, future))
            self._wake.notify()
        return await future

    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        with self._wake:
            if not self._closed:
                future: asyncio.Future[object] = self._loop.create_future()
                self._queues[Work.UPDATE].append(_Job(function, arguments, future))
                self._wake.notify()

    def load(self) -> LaneLoad:
        running = self._running
        now_runs = None if running is None else (running[0], time.perf_counter() - running[1])
        return self._durations.load([len(queue) for queue in self._queues], now_runs)

    async def close(self) -> None:
        with self._wake:
            self._closed = True
            for queue in self._queues:
                for job in queue:
                    job.future.cancel()
                queue.clear()
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _next(self) -> tuple[Work, _Job] | None:
        with self._wake:
            while True:
                kind = next_kind(
                    [len(queue) for queue in self._queues],
                    self._durations.serving_is_due,
                    self.weights_waiting,
                )
                if kind is not None:
                    return kind, self._queues[kind].popleft()
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
        self._waiting: tuple[deque[asyncio.Future[None]], ...] = tuple(deque() for _ in Work)
        self._busy = False
        self._running: tuple[Work, float] | None = None  # since when, in loop time
        self._durations = _Durations(share)

    async def run(self, kind: Work, function: Callable[..., T], *arguments: Any) -> T:
        if self._busy:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting[kind].append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn in self._waiting[kind]:
                    self._waiting[kind].remove(turn)
                elif turn.done() and not turn.cancelled():
                    self._hand_over()
                raise
        self._busy = True
        seconds = self._duration_s(kind)
        loop = asyncio.get_running_loop()
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

    def load(self) -> LaneLoad:
        running = self._running
        now_runs = None if running is None else (running[0], asyncio.get_running_loop().time() - running[1])
        return self._durations.load([len(queue) for queue in self._waiting], now_runs)

    async def close(self) -> None:
        for queue in self._waiting:
            while queue:
                queue.popleft().cancel()

    def _hand_over(self) -> None:
        while (
            kind := next_kind(
                [len(queue) for queue in self._waiting],
                self._durations.serving_is_due,
                self.weights_waiting,
            )
        ) is not None:
            turn = self._waiting[kind].popleft()
            if not turn.done():
                turn.set_result(None)
                return  # stays busy: the turn is taken
        self._busy = False
