"""Kinds of work on a compute lane: whose turn it is, how long it takes, what that makes of a queue. Pure.

Used by the lanes (`lane.py`), and by whoever names the kind of what it asks for.

Weight gradients yield to forwards, since nobody waits for them; once `weights_waiting` of them queue up they
go first, or a busy stage would never step and their activations would fill memory. Serving fills the gaps of
training, and of a lane that trains without a pause it takes its share of the time (`--inference-share`).
Of a kind the oldest goes first: a micro-batch that lost a replica elsewhere, or found no room for a while,
has activations held at every stage before.
"""

from __future__ import annotations

import bisect
import enum
import math
import operator
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
# Weight gradients in stock. Simulation of 1,000 peers, mean of three seeds: 0.856 of the ideal rate with 2
# and 0.887 with 6 (a replica full at two micro-batches); 0.898 with 8, 0.906 with 12 (full at four)
LEAST_WAITING, _MOST_WAITING = 2, 12
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
    return max(LEAST_WAITING, min(in_flight // 2, _MOST_WAITING))


def next_kind(
    waiting: Sequence[int], serving_is_due: bool = False, weights_waiting: int = LEAST_WAITING
) -> Work | None:
    """Which queue to serve, given how many wait in each (by Work's order). Pure.

    `serving_is_due`: one more piece of it stays within its share.
    """
    if waiting[Work.SERVE] and serving_is_due and not waiting[Work.UPDATE]:
        return Work.SERVE
    if waiting[Work.WEIGHT] >= weights_waiting and not waiting[Work.UPDATE] and not waiting[Work.BACKWARD]:
        return Work.WEIGHT
    return next((kind for kind in Work if waiting[kind]), None)


class Queues(Generic[T]):
    """What waits, by kind, the oldest first."""

    def __init__(self) -> None:
        self._of: tuple[list[tuple[float, T]], ...] = tuple([] for _ in Work)

    def add(self, kind: Work, since: float, item: T) -> None:
        """`since`: when it began to wait; of equal ones the first that came goes first."""
        bisect.insort(self._of[kind], (since, item), key=_SINCE)

    def waiting(self, before: float = math.inf) -> list[int]:
        """How many of each kind go before one that has waited since then."""
        return [bisect.bisect_right(queue, before, key=_SINCE) for queue in self._of]

    def pop(self, serving_is_due: bool, weights_waiting: int) -> tuple[Work, T] | None:
        """Whose turn it is; None: nothing waits."""
        kind = next_kind([len(queue) for queue in self._of], serving_is_due, weights_waiting)
        return None if kind is None else (kind, self._of[kind].pop(0)[1])

    def remove(self, kind: Work, item: T) -> bool:
        """Whether it was still waiting; it is not any more."""
        found = next((n for n, (_, other) in enumerate(self._of[kind]) if other is item), None)
        if found is not None:
            del self._of[kind][found]
        return found is not None

    def clear(self) -> list[T]:
        """All of them, which wait no more."""
        items = [item for queue in self._of for _, item in queue]
        for queue in self._of:
            queue.clear()
        return items


_SINCE: Callable[[tuple[float, object]], float] = operator.itemgetter(0)


class Durations:
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
