"""RecordGate: which stored values a directory believes. Used by both, on what comes in and what is found.

A value is a sealed, signed record filed under its peer's id until a stated time. The gate keeps a forger
among the members from masking somebody else's record: it must be signed by the peer it is filed under, be
in a bucket that is that peer's (`buckets`), and not outlive what that peer signed, so that a replayed
record always loses against a newer one.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from shoal.dht.buckets import Spot, path
from shoal.dht.directory import SignedRecord
from shoal.dht.records import Verifier, unseal, verify_record
from shoal.protocol import limits
from shoal.protocol.errors import AccessError, RecordInvalid
from shoal.protocol.identity import PeerId

EXPIRY_SLACK_S = 1.0  # publishers move the expiry by less than this to keep it growing


class RunSecret(Verifier, Protocol):
    """The part of `Membership` that a directory needs."""

    @property
    def sealing_key(self) -> bytes: ...


class Opened(NamedTuple):
    """A record that passed, the stages it names, when it expires, and how deep its bucket lies, if known."""

    signed: SignedRecord
    stages: tuple[int, ...]
    last_unix_s: float
    bits: int = 0


@dataclass(frozen=True, slots=True)
class _Passed:
    signed: SignedRecord
    last_unix_s: float
    stages: tuple[int, ...]


class RecordGate:
    """Opens and checks values; remembers the good ones until they expire."""

    def __init__(self, membership: RunSecret, clock: Callable[[], float], lowest_port: int) -> None:
        self._membership = membership
        self.clock = clock
        self._lowest_port = lowest_port
        self._passed: OrderedDict[bytes, _Passed] = OrderedDict()
        self.refused = 0  # values that did not pass

    def knows(self, peer: str, value: bytes) -> bool:
        """Whether `open` will be cheap."""
        return _digest(peer, value) in self._passed

    def open(self, peer: str, value: bytes, expires_unix_s: float, key: bytes | None = None) -> Opened:
        """The record in `value`, filed under `peer` until `expires_unix_s`; in the bucket of `key`, if known.

        Costs about 0.5 ms for a value not seen before. Raises RecordInvalid or AccessError.
        """
        try:
            return self._open(peer, value, expires_unix_s, key)
        except (RecordInvalid, AccessError):
            self.refused += 1
            raise

    def _open(self, peer: str, value: bytes, expires_unix_s: float, key: bytes | None) -> Opened:
        digest = _digest(peer, value)
        passed = self._passed.get(digest) or self._verified(peer, value)
        if not math.isfinite(expires_unix_s) or expires_unix_s > passed.last_unix_s + EXPIRY_SLACK_S:
            raise RecordInvalid(f"the record of {peer} is stored for longer than its peer signed")
        bits = 0 if key is None else self._bits(peer, passed.stages, key)
        self._passed[digest] = passed
        self._passed.move_to_end(digest)
        self._forget()
        return Opened(passed.signed, passed.stages, passed.last_unix_s, bits)

    def _bits(self, peer: str, stages: tuple[int, ...], key: bytes) -> int:
        """Of the bucket with this key: 2 us where records usually are, 0.2 ms at most."""
        run_id = self._membership.run_id
        for bucket in path(stages, Spot.of(peer, run_id)):
            if bucket.key(run_id) == key:
                return bucket.bits
        raise RecordInvalid(f"the record of {peer} is filed in a bucket that is not its own")

    def _forget(self) -> None:
        """Drop what expired, and what was not seen for longest when there is too much."""
        now = self.clock()
        while self._passed:
            longest_unseen = next(iter(self._passed.values()))
            if len(self._passed) <= limits.RECORDS_HELD and longest_unseen.last_unix_s >= now:
                return
            self._passed.popitem(last=False)

    def _verified(self, peer: str, value: bytes) -> _Passed:
        signed = unseal(value, self._membership.run_id, self._membership.sealing_key)
        record = verify_record(signed, self._membership, self.clock(), self._lowest_port)
        if record.peer != peer:
            raise RecordInvalid(f"a record of {record.peer} is filed under {PeerId(peer[:64])}")
        last_unix_s = record.issued_unix_s + min(record.ttl_s, limits.RECORD_TTL_MAX_S)
        return _Passed(signed, last_unix_s, record.stages)


def _digest(peer: str, value: bytes) -> bytes:
    return hashlib.blake2b(value, key=peer.encode(errors="replace")[:64], digest_size=16).digest()
