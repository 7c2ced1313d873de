"""Counts of this peer's own events since its process started, for `/metrics`."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter

from shoal.node.view.parts import EventRow, Histogram, Totals
from shoal.node.view.rounds import PHASES, phases_of
from shoal.node.view.texts import number

KINDS = 256
BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Counts:
    """They only grow."""

    def __init__(self) -> None:
        self._kinds = Counter[str]()
        self._reroutes = _Buckets()
        self._phases = {name: _Buckets() for name in PHASES}

    def add(self, row: EventRow) -> None:
        """One more event."""
        if len(self._kinds) < KINDS or row.kind in self._kinds:
            self._kinds[row.kind] += 1
        if row.kind == "reroute":
            self._reroutes.add(number(row.fields, "seconds") or 0.0)
        if row.kind == "round":
            for phase in phases_of(row.fields):
                self._phases[phase.name].add(phase.seconds)

    def totals(self) -> Totals:
        return Totals(
            reroutes=self._reroutes.histogram(),
            phases={name: buckets.histogram() for name, buckets in self._phases.items()},
            events=dict(self._kinds),
        )


class _Buckets:
    """A histogram that grows."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(BOUNDS_S, seconds)] += 1
        self._sum += seconds

    def histogram(self) -> Histogram:
        counts = tuple(itertools.accumulate(self._counts))
        return Histogram(bounds=BOUNDS_S, counts=counts, sum=self._sum)
