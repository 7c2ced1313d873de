"""Report: which bytes a member holds of each part of a draft, and what a leader makes of all reports.

digest of each part (32 bytes; zeros: not held), then bitmap of the seats each part lists
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from shoal.training.outer.entry import SKIP
from shoal.training.outer.reduce import Published

Decided = tuple[bytes, bytes]  # of a part: digest, bitmap of the seats it lists


def report(held: Mapping[int, Published], parts: int, bitmap_bytes: int) -> bytes:
    """Of what is held of a draft with so many parts."""
    nothing = Published(bytes(bitmap_bytes), b"", SKIP)
    every = [held.get(part, nothing) for part in range(parts)]
    return b"".join(part.digest for part in every) + b"".join(part.listed for part in every)


def report_bytes(parts: int, bitmap_bytes: int) -> int:
    """Size of a report."""
    return parts * (len(SKIP) + bitmap_bytes)


def most_held(reports: Sequence[bytes], here: int, parts: int, bitmap_bytes: int) -> list[Decided | None]:
    """What to commit of each part: what most reports hold, if they are more than half of those `here`.

    A part in the hands of a few could be lost with them after COMMIT, and the chain with it.
    """
    size = len(SKIP)
    distinct = Counter(reports)  # few: nearly all are equal
    results: list[Decided | None] = []
    for part in range(parts):
        at = size * parts + bitmap_bytes * part
        held: Counter[Decided] = Counter()
        for found, times in distinct.items():
            held[found[size * part : size * (part + 1)], found[at : at + bitmap_bytes]] += times
        decided, holders = max(
            held.items(), key=lambda item: (item[0][0] != SKIP, item[1]), default=((SKIP, b""), 0)
        )
        results.append(decided if decided[0] != SKIP and 2 * holders > here else None)
    return results
