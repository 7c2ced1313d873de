"""Which sessions' positions are computed next, together. Pure.

Single positions of running texts go first, for somebody reads them; what room is left takes chunks of
prompts, the longest waiting first. A prompt gets PROMPT_ROWS of every batch, however many texts run.

A batch's weights stream through memory once, however few rows it has. Left alone, sessions come to go round
a ring of S servers in S groups, each of which has all weights read for itself. So at the first stage a group
is held for another one that is no smaller, until both go on as one; nobody is held for who is late, who goes
round much more slowly, or where rows cost more than reading the weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MOST_ROWS = 128  # of a batch: what a session adds to the lane's queue before training's next turn
PROMPT_ROWS = 32
_LATE = 1.25  # of the usual time away
_PATIENT = 8
_RECENT = 0.02  # the weight of the latest batch
STEP_ROWS = 4  # up to so many positions waiting are steps of a text, not a prompt


@dataclass(frozen=True, slots=True)
class Waiting:
    """A session with positions to compute."""

    key: int
    version: bytes
    rows: int
    since_s: float


@dataclass(frozen=True, slots=True)
class Mates:
    """A batch whose sessions go on to the same server."""

    feeder: str
    batch: int
    count: int


ALONE = Mates("", 0, 0)


@dataclass(frozen=True, slots=True)
class Away:
    """A session whose next position is on its way round the ring."""

    since_s: float
    usual_s: float  # how long it is away

    @property
    def due_s(self) -> float:
        return self.since_s + self.usual_s

    @property
    def late_s(self) -> float:
        """From then on nobody waits for it."""
        return self.since_s + _LATE * self.usual_s


class StepCost:
    """What a batch takes: a share that is fixed, and one for each row. Of those seen of late."""

    def __init__(self) -> None:
        self._rows = self._seconds = self._variance = self._covariance = 0.0

    def add(self, rows: int, seconds: float) -> None:
        if not self._rows:
            self._rows, self._seconds = float(rows), seconds
        more, longer = rows - self._rows, seconds - self._seconds
        self._rows += _RECENT * more
        self._seconds += _RECENT * longer
        self._variance += _RECENT * ((1 - _RECENT) * more * more - self._variance)
        self._covariance += _RECENT * ((1 - _RECENT) * more * longer - self._covariance)

    @property
    def cheap_rows(self) -> float:
        """Up to so many cost no more than what is fixed."""
        each_s = self._covariance / self._variance if self._variance > _RECENT else 0.0
        return (self._seconds - each_s * self._rows) / each_s if each_s > 0.0 else math.inf


def mates_until_s(waiting: Sequence[tuple[Mates, float]], short_s: float) -> float:
    """Until when a batch is held for the rest of those that were computed together before.

    `waiting`: with whom each session came, and since when it waits. They come one after another: for the next
    one of them `short_s`; and nobody more than _PATIENT of those, however many come that say they have mates.
    """
    here = Counter(mates for mates, _ in waiting)
    held = max((since + short_s for mates, since in waiting if here[mates] < mates.count), default=-math.inf)
    return min(held, min((since for _, since in waiting), default=math.inf) + _PATIENT * short_s)


def others_until_s(now_s: float, waiting: int, away: Sequence[Away], round_s: float, most: float) -> float:
    """Until when a batch of so many sessions is held for those away, to go round with them from then on.

    For at least as many as wait, and no more than `most` together, that are due within `round_s`: what those
    that wait usually take for a round.
    """
    due = [
        one
        for one in away
        if one.usual_s <= _LATE * round_s and now_s < one.late_s and one.due_s <= now_s + _LATE * round_s
    ]
    fits = waiting <= len(due) <= most - waiting
    return max(one.late_s for one in due) if due and fits else -math.inf


def next_batch(waiting: Sequence[Waiting], most_rows: int = MOST_ROWS) -> list[tuple[int, int]]:
    """(key, rows) of one batch; all of one version, that of the longest waiting."""
    if not waiting:
        return []
    in_order = sorted(waiting, key=lambda one: (one.since_s, one.key))
    fitting = [one for one in in_order if one.version == in_order[0].version]
    steps = [one for one in fitting if one.rows <= STEP_ROWS]
    prompts = [one for one in fitting if one.rows > STEP_ROWS]
    left = most_rows
    batch: list[tuple[int, int]] = []
    for one in steps:
        if one.rows > left - (PROMPT_ROWS if prompts else 0):
            break
        batch.append((one.key, one.rows))
        left -= one.rows
    for one in prompts:
        if left <= 0:
            break
        batch.append((one.key, min(one.rows, left)))
        left -= batch[-1][1]
    return batch
