"""Parts: how a stage's flat vector is cut for a round. Pure; every peer computes the same from the spec."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.protocol import limits

FRAGMENTS = 1  # one schedule for the whole stage; entries carry the index so that more may come


@dataclass(frozen=True, slots=True)
class Part:
    """Values [start, start + count) of the flat vector."""

    index: int
    start: int
    count: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.count)


def cut(size: int, part_bytes: int, block: int) -> tuple[Part, ...]:
    """Equal parts of at most about `part_bytes` of fp32, each but the last a multiple of `block` values.

    Larger parts where there would be more than limits.PARTS of them.
    """
    most = max(part_bytes // 4, -(-size // limits.PARTS), block)
    number = -(-size // most)
    count = _up(-(-size // number), block)
    starts = range(0, size, count)
    return tuple(Part(i, start, min(count, size - start)) for i, start in enumerate(starts))


def _up(count: int, block: int) -> int:
    return -(-count // block) * block
