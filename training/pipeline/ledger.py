"""What was decided: which micro-batches this replica applied and under which chain.

P2 rests on it: a micro-batch is applied at most once. A replica sees a driver's numbers with gaps, where the
others of its group have theirs, so intervals would grow for ever. It knows each of the last ones applied;
what a driver counted before those is refused as if it had been applied (its deadline passed long ago).
"""

from __future__ import annotations

import bisect
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from shoal.training.pipeline.messages import Link, MicroBatch

CHAINS_KEPT = 4096  # decided chains remembered to answer queries of undecided hops
APPLIED_KEPT = 65_536  # known one by one: hours of micro-batches, of which one is undecided for minutes


@dataclass(slots=True)
class Intervals:
    """A set of integers kept as sorted half-open intervals; all those below `floor` are in it, too."""

    spans: list[tuple[int, int]] = field(default_factory=list)
    floor: int = 0

    def raise_floor(self, floor: int) -> None:
        """Forget what there is below."""
        self.floor = max(self.floor, floor)
        index = bisect.bisect_left(self.spans, (self.floor, self.floor))
        if index > 0 and self.spans[index - 1][1] > self.floor:
            index -= 1
            self.spans[index] = (self.floor, self.spans[index][1])
        del self.spans[:index]

    def __contains__(self, number: int) -> bool:
        if number < self.floor:
            return True
        index = bisect.bisect_right(self.spans, (number, number + (1 << 62))) - 1
        return index >= 0 and self.spans[index][0] <= number < self.spans[index][1]

    def add(self, number: int) -> None:
        """Add one integer that is not in the set."""
        start, stop = number, number + 1
        index = bisect.bisect_left(self.spans, (start, stop))
        if index < len(self.spans) and self.spans[index][0] == stop:
            stop = self.spans.pop(index)[1]
        if index > 0 and self.spans[index - 1][1] == start:
            index -= 1
            start = self.spans.pop(index)[0]
        self.spans.insert(index, (start, stop))


class Ledger:
    """Applied micro-batches of one stage at one replica."""

    def __init__(self) -> None:
        self._applied: dict[tuple[str, int], Intervals] = {}
        self._newest: deque[MicroBatch] = deque()
        self._count = 0
        self._chains: OrderedDict[MicroBatch, tuple[Link, ...]] = OrderedDict()
        self.duplicates_refused = 0  # propagates and commits of what was applied before
        self.abandoned = 0  # attempts that failed, or that the decision did not name: nothing is missing
        self.dropped = 0  # undecided for too long: their gradients may be missing here
        self.tokens = 0

    def has(self, micro_batch: MicroBatch) -> bool:
        spans = self._applied.get((micro_batch.driver, micro_batch.incarnation))
        return spans is not None and micro_batch.number in spans

    def apply(self, micro_batch: MicroBatch, chain: tuple[Link, ...], tokens: int) -> bool:
        """Record a decision; False, and counted, when it was recorded before."""
        if self.has(micro_batch):
            self.duplicates_refused += 1
            return False
        self._applied.setdefault((micro_batch.driver, micro_batch.incarnation), Intervals()).add(
            micro_batch.number
        )
        self._count += 1
        self._newest.append(micro_batch)
        if len(self._newest) > APPLIED_KEPT:
            self._forget(self._newest.popleft())
        self._chains[micro_batch] = chain
        if len(self._chains) > CHAINS_KEPT:
            self._chains.popitem(last=False)
        self.tokens += tokens
        return True

    def _forget(self, oldest: MicroBatch) -> None:
        process = (oldest.driver, oldest.incarnation)
        spans = self._applied.get(process)
        if spans is not None:
            spans.raise_floor(oldest.number + 1)
            if not spans.spans:  # nothing of this process for hours
                del self._applied[process]

    def chain(self, micro_batch: MicroBatch) -> tuple[Link, ...]:
        """The decided chain; empty when unknown or long ago."""
        return self._chains.get(micro_batch, ())

    def applied(self) -> dict[str, list[tuple[int, int]]]:
        """`driver/incarnation` -> intervals of applied numbers, as far as known, for status and tests."""
        return {
            f"{driver}/{incarnation}": list(spans.spans)
            for (driver, incarnation), spans in self._applied.items()
        }

    def __len__(self) -> int:
        return self._count
