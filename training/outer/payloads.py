"""Payloads: the published parts of recent entries, by digest, to a byte budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from shoal.training.outer.reduce import Published


class Payloads:
    """Keeps every entry's parts since the last snapshot, and older ones while the budget lasts."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._heights: OrderedDict[int, Mapping[int, Published]] = OrderedDict()
        self._by_digest: dict[bytes, Published] = {}
        self.held_bytes = 0

    def keep(self, height: int, parts: Mapping[int, Published]) -> None:
        """Take in an entry's parts."""
        self._heights[height] = parts
        self.held_bytes += _bytes(parts)
        self._by_digest.update((part.digest, part) for part in parts.values())

    def parts_at(self, height: int) -> Mapping[int, Published]:
        """The parts of a height's entry that are still here."""
        return self._heights.get(height, {})

    def find(self, digest: bytes) -> Published | None:
        """The part of that digest, if it is still here."""
        return self._by_digest.get(digest)

    def prune(self, snapshot_height: int) -> None:
        """Drop the oldest parts that a snapshot covers while there are more bytes than the budget."""
        while (
            self.held_bytes > self._budget_bytes and (oldest := next(iter(self._heights))) <= snapshot_height
        ):
            parts = self._heights.pop(oldest)
            self.held_bytes -= _bytes(parts)
            for part in parts.values():
                if self._by_digest.get(part.digest) is part:  # a later round may have made the same bytes
                    del self._by_digest[part.digest]

    def clear(self) -> None:
        """Forget all: they belong to another chain."""
        self._heights.clear()
        self._by_digest.clear()
        self.held_bytes = 0


def _bytes(parts: Mapping[int, Published]) -> int:
    return sum(memoryview(part.encoded).nbytes for part in parts.values())
