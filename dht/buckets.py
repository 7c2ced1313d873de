"""Where records are filed in the directory, so that a swarm of any size costs each of its peers the same.

*Buckets.* A tree of keys: one bucket for everybody, below it one for each stage (and one for those who hold
none), below that halves, quarters and so on of the stage, by the bits of the peer's `Spot`, a hash. A
bucket's holders keep at most FULL records, those of the lowest rank, another hash. So a bucket with fewer
shows everybody who belongs there, and only there does absence say anything; a full one shows a fair sample,
whose highest rank tells how many there are (its share of all ranks is FULL's share of them). Nobody counts
the swarm: sizes are estimated from what the peers signed themselves. Who tries many ids can take the lowest
ranks of a bucket and make it look larger. So a full one raises the size of a stage by one level a look at
most, and a look one level too deep, where there is room, mends it; the size of all is only a first guess.

*Writing.* A peer files its record from the top down until the buckets are surely not full, and above that
wherever its rank has a chance: four or five stores. Its stages and its id give all its buckets, so who knows
them finds it.

*Reading.* Below FULL peers: everything, from one bucket. Beyond, a look takes one bucket after the other, of
those that are usually not full and from a random one on, of each stage that matters to the reader (its own,
the next, the previous), and of others in random order, until about LOOK_RECORDS are read; a newcomer, who may
have to choose a stage, two of each. The records of everybody else come from neighbours, as those of a small
swarm do, too.

A holder of one token can make peers until buckets are full and so push others down: FULL of them, of low
ranks, for a bucket. To hide a peer it needs as many in each bucket of that peer down to where others look for
it, which takes ids of like places, and twice as many tries a level. `Survey` is what one peer knows of
all this; both directories use it, and the policy simulation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shoal.protocol import limits
from shoal.protocol.identity import PeerId

FULL = 32  # records that a bucket keeps: as many peers as hold streams with one another
LOOK_RECORDS = 64  # read in a look, about
LOOK_BUCKETS = 16  # read in a look, at most, but a newcomer's
BITS_MOST = 16  # below a stage's bucket: two million of a stage
EVERYBODY, NOWHERE = -2, -1  # groups that are no stages: all peers, and those that hold none
_LEAF = FULL * 7 // 8  # of a bucket that is read, usually: so few that it is seldom full
_AHEAD = FULL // 2  # of a bucket whose halves are written too: others may take it for one of more than _LEAF
_CHANCE = 2.0  # a rank is tried up to so many times the one that is expected to fit
_SHARE = 0.125  # of a new look in the size of a group, after the first ones
_WIDELY = 2  # buckets of a stage that a newcomer reads in each of its first looks
_BEYOND = 5  # stages after the highest one seen that a newcomer tries: a first sample may miss some
_ROOT_LOOKS = 8  # in a large swarm one look of so many reads everybody's bucket again
_RANKS = 1 << 64
_UNKNOWN = -1.0  # the size of a group of which one peer was seen, elsewhere


class Bucket(NamedTuple):
    """`bits` of the peers' places have the value `prefix`."""

    group: int
    bits: int = 0
    prefix: int = 0

    def key(self, run_id: bytes) -> bytes:
        """Its 20 bytes in the DHT."""
        name = b"shoal bucket %d %d %d" % self
        return hashlib.blake2b(name, key=run_id, digest_size=20).digest()


ROOT = Bucket(EVERYBODY)


@dataclass(frozen=True, slots=True)
class Spot:
    """What decides on a peer's buckets: 64 bits of place, 64 of rank."""

    place: int
    rank: int

    @classmethod
    def of(cls, peer: PeerId | str, run_id: bytes) -> Spot:
        digest = hashlib.blake2b(peer.encode(errors="replace"), key=run_id, digest_size=16).digest()
        return cls(int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big"))

    def bucket(self, group: int, bits: int) -> Bucket:
        return Bucket(group, bits, self.place >> (64 - bits))


def path(stages: Collection[int], spot: Spot) -> Iterator[Bucket]:
    """All buckets that may hold the record of a peer with these stages, from the top down."""
    yield ROOT
    for bits in range(BITS_MOST + 1):
        for group in stages or (NOWHERE,):
            yield spot.bucket(group, bits)


def estimate(ranks: Sequence[int]) -> float:
    """How many belong to a bucket that shows these ranks."""
    if len(ranks) < FULL:
        return float(len(ranks))
    return max(float(FULL), (FULL - 1) / (max(sorted(ranks)[FULL - 1], 1) / _RANKS))


class Survey:
    """What one peer has found out of the buckets."""

    def __init__(self, spot: Spot, rng: random.Random) -> None:
        self._spot = spot
        self._rng = rng
        self._sizes: dict[int, float] = {EVERYBODY: 0.0, NOWHERE: _UNKNOWN}
        self._looks = 0
        self._looked: dict[int, int] = {}
        self._turns: dict[int, int] = {}

    @property
    def crowded(self) -> bool:
        """Whether there are more than one bucket shows."""
        return self._sizes[EVERYBODY] >= FULL

    def sizes(self) -> dict[int, float]:
        """Of the stages, about, if only a part of the swarm was read; else nothing."""
        return {g: size for g, size in self._sizes.items() if g >= 0 < size} if self.crowded else {}

    # --- reading

    def look(self, stages: Collection[int] = (), *, widely: bool = False) -> list[Bucket]:
        """Which buckets to read now. `stages`: those that the reader holds; `widely`: all matter."""
        self._looks += 1
        if not self.crowded:
            return [ROOT]
        found = [ROOT] if self._looks % _ROOT_LOOKS == 0 else []
        expected = len(found) * FULL
        near = dict.fromkeys(stage + step for step in (0, 1, -1) for stage in sorted(stages))
        groups = [group for group in near if 0 <= group < limits.STAGES]
        met = [*self._sizes, *(range(min(max(self._sizes) + _BEYOND, limits.STAGES)) if widely else ())]
        others = [group for group in dict.fromkeys(met) if group not in groups and group != EVERYBODY]
        self._rng.shuffle(others)
        for group in groups + others:
            if not widely and (expected >= LOOK_RECORDS or len(found) >= LOOK_BUCKETS):
                break
            bits = self._bits(group)
            for _ in range(min(_WIDELY, 2**bits) if widely else 1):
                turn = self._turns[group] = self._turns.get(group, self._rng.getrandbits(BITS_MOST)) + 1
                found.append(Bucket(group, bits, turn % 2**bits))
            expected += int(self._size(group) / 2**bits)
        return found

    def saw(self, bucket: Bucket, ranks: Sequence[int], stages: Iterable[int]) -> None:
        """What a look showed in a bucket: the rank of each peer, and stages of theirs."""
        for stage in stages:
            self._sizes.setdefault(stage, _UNKNOWN)
        size = estimate(ranks) * 2**bucket.bits
        before = self._sizes.get(bucket.group, _UNKNOWN)
        looked = self._looked.get(bucket.group, 0)
        if len(ranks) < FULL:  # else all readers see the same lowest ranks, and err alike
            looked = self._looked[bucket.group] = looked + 1
        elif bucket != ROOT:  # of ids that were chosen for their ranks, perhaps
            size = min(size, 2 * max(before, float(FULL * 2**bucket.bits)))
        share = max(_SHARE, 1 / max(looked, 1)) if bucket.bits else 1.0
        self._sizes[bucket.group] = before + share * (size - before)

    def _size(self, group: int) -> float:
        size = self._sizes.get(group, _UNKNOWN)
        return size if size >= 0 else self._sizes[EVERYBODY] / max(len(self._sizes) - 1, 1)

    def _bits(self, group: int) -> int:
        size, bits = self._size(group), 0
        while size > _LEAF and bits < BITS_MOST:
            size, bits = size / 2, bits + 1
        return bits

    # --- writing

    def filed(self, stages: Collection[int]) -> list[Bucket]:
        """Where this peer's record goes, from the top down; always somewhere, however large all looks."""
        everybody = self._sizes[EVERYBODY]
        found = [ROOT] if self._fits(everybody) else []
        if everybody <= _AHEAD:
            return found
        for group in stages or (NOWHERE,):
            size = self._size(group)
            for bits in range(BITS_MOST + 1):
                if self._fits(size) or bits == BITS_MOST:
                    found.append(self._spot.bucket(group, bits))
                if size <= _AHEAD:
                    break
                size /= 2
        return found

    def _fits(self, size: float) -> bool:
        return size <= FULL or self._spot.rank * size < _CHANCE * FULL * _RANKS
