"""What the directory shows, and what it costs each peer, in the policy simulation.

`dht.buckets` decides where records are and which of them a look reads, here as in both directories; only the
records themselves are left out. Counted as `MemoryDirectoryHub` counts: values stored and values found.
Not in here: what neighbours tell one another, which no longer grows with the swarm (`dht.interest`);
`tests/benchmarks/gossip.py` measures it on real links.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal.dht.buckets import EVERYBODY, FULL, LOOK_RECORDS, Bucket, Spot, Survey
from shoal.dht.directory import PeerRecord
from shoal.dht.neighbours import SMALL_SWARM
from shoal.dht.records import seal, sign_record
from shoal.dht.roster import LARGE_SWARM_TTL_S, REFRESH_S
from shoal.node.simulate.fleet import Node
from shoal.node.simulate.membership import PaperMembership, simulated_key
from shoal.protocol.limits import RECORD_TTL_S

_LOOKS = 8  # until sizes are known, and for a mean
_JITTER = statistics.fmean((0.8, 1.0))  # of both intervals
_RUN = bytes(32)
_COLUMNS = np.dtype([("place", np.uint64), ("rank", np.uint64), ("stage", np.int64), ("speed", np.float64)])


class Shelf:
    """The records of one group, as columns in no order."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._at: dict[Node, int] = {}
        self._columns = np.zeros(64, _COLUMNS)

    def add(self, node: Node, spot: Spot, speed: float) -> None:
        at = self._at[node] = len(self.nodes)
        self.nodes.append(node)
        if at == len(self._columns):
            self._columns = np.resize(self._columns, 2 * at)
        self._columns[at] = spot.place, spot.rank, node.stage, speed

    def remove(self, node: Node) -> None:
        at, last = self._at.pop(node), self.nodes.pop()
        if last is not node:
            self.nodes[at], self._at[last] = last, at
            self._columns[at] = self._columns[len(self.nodes)]

    def show(self, bits: int = 0, prefix: int = 0) -> Any:
        """The rows that a bucket shows."""
        found = self._columns[: len(self.nodes)]
        if bits:
            found = found[found["place"] >> np.uint64(64 - bits) == prefix]
        return found[np.argpartition(found["rank"], FULL)[:FULL]] if len(found) > FULL else found


class Shelves:
    """Everybody's records by group."""

    def __init__(self, stages: int) -> None:
        self.groups = [Shelf() for _ in range(stages)]
        self._all = Shelf()
        self._spots: dict[Node, Spot] = {}

    def file(self, node: Node, speed: float) -> None:
        """It announced its stage."""
        spot = self._spots[node] = Spot.of(node.name, _RUN)
        self.groups[node.stage].add(node, spot, speed)
        self._all.add(node, spot, speed)

    def take_away(self, node: Node) -> None:
        if self._spots.pop(node, None) is not None:
            self.groups[node.stage].remove(node)
            self._all.remove(node)

    def look(self, survey: Survey, stages: Sequence[int], *, widely: bool = False) -> list[Any]:
        """One look: the rows of each bucket that it reads."""
        found = []
        for bucket in survey.look(stages, widely=widely):
            rows = self._show(bucket)
            survey.saw(bucket, rows["rank"].tolist(), set(rows["stage"].tolist()))
            found.append(rows)
        return found

    def bytes_per_s(self, rng: random.Random) -> float:
        """What one peer, drawn by chance, stores and finds, once it knows its swarm."""
        everybody = self._all.nodes
        node = rng.choice(everybody)
        survey = Survey(self._spots[node], rng)
        rates = []
        for _ in range(2 * _LOOKS):
            read = sum(map(len, self.look(survey, (node.stage,))))
            rates.append(read / (REFRESH_S * max(1.0, read / LOOK_RECORDS) * _JITTER))
        ttl_s = RECORD_TTL_S if len(everybody) <= SMALL_SWARM else LARGE_SWARM_TTL_S
        stored = len(survey.filed((node.stage,)))
        return RECORD_BYTES * (stored / (ttl_s / 3 * _JITTER) + statistics.fmean(rates[_LOOKS:]))

    def _show(self, bucket: Bucket) -> Any:
        if bucket.group == EVERYBODY:
            return self._all.show()
        if not 0 <= bucket.group < len(self.groups):
            return np.zeros(0, _COLUMNS)
        return self.groups[bucket.group].show(bucket.bits, bucket.prefix)


def _record_bytes() -> int:
    """A record as it is stored: chain, signature and seal included."""
    membership = PaperMembership(_RUN, simulated_key(0, 0), lambda: 0.0)
    record = PeerRecord(
        peer=membership.key.peer,
        incarnation=1 << 60,
        sequence=1,
        issued_unix_s=1.8e9,
        ttl_s=LARGE_SWARM_TTL_S,
        state="online",
        stages=(0,),
        name="p0",
        addresses=("127.0.0.1:5000",),
        chain=membership.chain,
        device="cpu",
        tokens_per_s=0.0,
        version="0",
        service_s=1.0,
    )
    signed = sign_record(record, membership.key, _RUN)
    return len(seal(signed, _RUN, membership.sealing_key, bytes))


RECORD_BYTES = _record_bytes()
