"""Of whom a peer of a large swarm keeps records: its neighbourhood in the pipeline, and some of the rest.

A pure policy; `circle` acts on it. A peer knows about `Known.near` of its own stage, as many of the next and
of the previous one, and `Known.anybody` of all; in a swarm of up to `Known.everybody`, all. Who it is says a
hash of the unordered pair, the one by which neighbours are chosen, so each side of a link can tell what the
other one wants, without being told, and neighbours are always among those known. Sizes of stages are
estimates of each peer's own, so two may differ over a pair at the edge.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from blake3 import blake3

from shoal.protocol.identity import PeerId

_WEIGHTS = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """How many records a peer of a large swarm keeps, about."""

    near: int = 32  # of each of three stages; above the places that neighbours of a stage have
    anybody: int = 96
    everybody: int = 160  # a swarm of so many, as it is estimated, is known whole


KNOWN = Known()


def of_interest(
    me: PeerId,
    mine: Collection[int],
    other: PeerId,
    theirs: Collection[int],
    sizes: Mapping[int, float],
    known: Known,
) -> bool:
    """Whether a peer at stages `mine` keeps the record of one at `theirs`. `sizes`: of stages, about."""
    share = interest(mine, theirs, sizes, known)
    return share >= 1.0 or pair_weight(me, other) < share * _WEIGHTS


def interest(
    mine: Collection[int], theirs: Collection[int], sizes: Mapping[int, float], known: Known
) -> float:
    """The share of those at `theirs` that a peer at `mine` keeps. Without sizes it is all."""
    everybody = sum(sizes.values())
    if everybody <= known.everybody:
        return 1.0
    near = {stage + step for stage in mine for step in (0, 1, -1)}
    shares = [known.near / max(sizes.get(stage, 0.0), 1.0) for stage in theirs if stage in near]
    return min(1.0, max([known.anybody / everybody, *shares]))


@functools.lru_cache(maxsize=1 << 15)
def pair_weight(one: PeerId, other: PeerId) -> int:
    """64 bits, the same from both sides."""
    low, high = sorted((one, other))
    return int.from_bytes(blake3(f"shoal neighbours {low} {high}".encode()).digest(8), "big")
