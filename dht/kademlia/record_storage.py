"""RecordStorage: the records that this node keeps for the DHT, never too many. Made by `call_guard`.

The limits are held where a record is stored, so neither one call with many nor several at once get around.
A bucket keeps the FULL lowest ranks. All buckets together keep RECORDS_HELD records: a holder of one token
can make any number of peers, and each may lie in 137 buckets. When there are that many, the oldest of the
deepest buckets makes room, and what is filed deeper still is refused. For honest records lie as high up as
there is room; those in the buckets of everybody and of whole stages are too few to ever have to go; and in
the deepest level that is kept nobody is locked out by rank or age: who was pushed out is back with its next
record. To lock out a whole level takes thousands of peers that fill all those above it, and go on doing so.
"""

from __future__ import annotations

import heapq
from typing import Any

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue

from shoal.dht.buckets import FULL, Spot
from shoal.dht.gate import RecordGate
from shoal.dht.kademlia.values import sealed_in
from shoal.protocol import limits
from shoal.protocol.errors import AccessError, FrameInvalid, RecordInvalid

_RECOUNT_S = 1.0  # between two counts of what has not expired: about 20 ms


class RecordStorage(DHTLocalStorage):  # type: ignore[misc]  # hivemind is untyped
    """Takes what the gate lets pass and finds room; hivemind's node reads and writes it."""

    def __init__(self, gate: RecordGate, run_id: bytes) -> None:
        super().__init__()
        self._gate = gate
        self._run_id = run_id
        self._levels: dict[int, dict[DHTID, None]] = {}  # the buckets by their bits, the oldest first
        self._count = 0  # of records, with some that have expired since `_counted_s`
        self._counted_s = 0.0

    def store_subkey(self, key: DHTID, peer: str, value: bytes, expires_unix_s: float) -> bool:
        """Whether the record of `peer` was taken into the bucket of `key`."""
        try:
            bits = self._gate.open(peer, sealed_in(value), expires_unix_s, key.to_bytes()).bits
        except (RecordInvalid, AccessError, FrameInvalid):
            return False
        if expires_unix_s < self._gate.clock():
            return False
        bucket = self._bucket(key)
        is_new = bucket is None or peer not in bucket
        if is_new and not self._make_room(bucket, peer, bits):
            return False
        stored = bool(super().store_subkey(key, peer, value, expires_unix_s))
        if stored and is_new:
            self._count += 1
            self._levels.setdefault(bits, {}).setdefault(key)
        for storage in (self, self._bucket(key)):
            _compact(storage)
        return stored

    def _bucket(self, key: DHTID) -> Any:
        held = self.get(key)
        return held.value if held is not None and isinstance(held.value, DictionaryDHTValue) else None

    def _make_room(self, bucket: Any, peer: str, bits: int) -> bool:
        """For one more in a bucket. False: there is none for this peer."""
        if bucket is not None and len(bucket) >= FULL:
            highest = max(bucket.data, key=self._rank)
            if self._rank(peer) > self._rank(highest):
                return False
            self._drop(bucket, highest)
            return True
        if self._count >= limits.RECORDS_HELD:
            now_s = self._gate.clock()
            if not 0.0 <= now_s - self._counted_s < _RECOUNT_S:
                self._recount(now_s)
        while self._count >= limits.RECORDS_HELD:
            deepest = max(self._levels, default=None)
            if deepest is None:  # all has expired since
                self._count = 0
                break
            if bits > deepest:
                return False
            oldest = next(iter(self._levels[deepest]))
            other = self._bucket(oldest)
            if other:
                self._drop(other, max(other.data, key=self._rank))
            if not other:
                self._forget(deepest, oldest)
        return True

    def _drop(self, bucket: Any, peer: str) -> None:
        del bucket[peer]
        self._count -= 1

    def _forget(self, bits: int, key: DHTID) -> None:
        del self[key], self._levels[bits][key]
        if not self._levels[bits]:
            del self._levels[bits]

    def _recount(self, now_s: float) -> None:
        self._counted_s, self._count = now_s, 0
        for bits, keys in list(self._levels.items()):
            for key in list(keys):
                held = len(self._bucket(key) or ())
                self._count += held
                if not held:
                    self._forget(bits, key)

    def _rank(self, peer: str) -> int:
        return Spot.of(peer, self._run_id).rank


def _compact(storage: Any) -> None:
    """hivemind notes the expiry of each store until then, also of those that replaced one another."""
    if storage is not None and len(storage.expiration_heap) > 2 * len(storage.data) + FULL:
        storage.expiration_heap = list(storage.key_to_heap.values())
        heapq.heapify(storage.expiration_heap)
