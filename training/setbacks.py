"""Setbacks: the stages that a peer could not go to of late, and when it may try again. `Tenure` owns one.

Each failure in a row doubles the wait, up to some windows of the plan; meanwhile the peer says that it stays,
and the plan names another one. Pure: time and randomness are arguments.
"""

from __future__ import annotations

import math
import random

MOST_WINDOWS = 16.0


class Setbacks:
    """See the module. Times are the loop's."""

    def __init__(self, window_s: float, rng: random.Random) -> None:
        self._window_s = window_s
        self._rng = rng
        self._times: dict[int, int] = {}  # failures in a row, by stage
        self._until_s: dict[int, float] = {}

    def failed(self, stage: int, now_s: float, *, for_good: bool = False) -> None:
        """It could not go there; `for_good`: it never will."""
        times = self._times[stage] = min(self._times.get(stage, 0) + 1, 16)
        windows = min(2.0**times, MOST_WINDOWS) * self._rng.uniform(1.0, 1.5)
        self._until_s[stage] = math.inf if for_good else now_s + windows * self._window_s

    def over(self, stage: int) -> None:
        """It is there."""
        self._times.pop(stage, None)
        self._until_s.pop(stage, None)

    def bar(self, stage: int, now_s: float) -> bool:
        """Whether it does not try now."""
        return now_s < self._until_s.get(stage, 0.0)
