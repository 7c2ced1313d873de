"""Parts and fragments: how a stage's flat vector is cut for rounds. Pure; every peer computes the same from
the spec.

A round synchronises one fragment, in turns by height; a fragment is reduced in parts, each by its owner.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from shoal.protocol import limits

_SHARED_OUT = 24  # 2, 3, 4, 6, 8 and 12 owners have equally many: a fragment has so many parts, or a multiple
_LEAST_VALUES = 1 << 14  # but none smaller than this for it
_LARGER = 22  # a part may exceed `part_bytes` by so small a share: as int8, 4 MiB and that still fit a frame


@dataclass(frozen=True, slots=True)
class Part:
    """Values [start, start + count) of the flat vector. The index counts over all fragments."""

    index: int
    start: int
    count: int

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.count)


@dataclass(frozen=True, slots=True)
class Fragment:
    """Consecutive parts that are synchronised together. Entries and messages count parts from its first."""

    index: int
    parts: tuple[Part, ...]

    @property
    def start(self) -> int:
        return self.parts[0].start

    @property
    def count(self) -> int:
        return self.parts[-1].start + self.parts[-1].count - self.start

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.count)

    def within(self, part: Part) -> slice:
        """Where a part lies in a vector that holds just this fragment."""
        return slice(part.start - self.start, part.start - self.start + part.count)


def cut(size: int, part_bytes: int, block: int, fragments: int = 1) -> tuple[Fragment, ...]:
    """Fragments of equal bytes, each in equal parts of at most about `part_bytes` of fp32.

    All but the last begin and end at a multiple of `block` values.

    Smaller parts where few peers would own all of a small fragment, and as many as most groups can share out
    evenly: the busiest owner's link holds up everybody. Larger ones where a fragment would have more than
    limits.PARTS of them; fewer fragments where there are not enough blocks.
    """
    number = max(1, min(fragments, size // block))
    starts = [_up(size * f // number, block) for f in range(number)] + [size]
    found: list[Fragment] = []
    first = 0
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        wanted = min(part_bytes // 4, max(-(-(stop - start) // _SHARED_OUT), _LEAST_VALUES))
        most = max(wanted, -(-(stop - start) // limits.PARTS), block)
        parts = -(-(stop - start) // most)
        if parts > _SHARED_OUT:
            parts = -(-(stop - start) // (most + most // _LARGER))
            parts = min(_up(parts, _SHARED_OUT), limits.PARTS)
        count = _up(-(-(stop - start) // parts), block)
        spans = [(at, min(count, stop - at)) for at in range(start, stop, count)]
        found.append(Fragment(index, tuple(Part(first + i, *span) for i, span in enumerate(spans))))
        first += len(spans)
    return tuple(found)


def _up(count: int, block: int) -> int:
    return -(-count // block) * block
