"""RecordGate: which stored values a directory believes. Used by both, on what comes in and what is found.

A value is a sealed, signed record filed under its peer's id until a stated time. The gate keeps a forger
among the members from masking somebody else's record: it must be signed by the peer it is filed under, and
it may not outlive what that peer signed, so that a replayed record always loses against a newer one.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

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


@dataclass(frozen=True, slots=True)
class _Passed:
    signed: SignedRecord
    last_unix_s: float


class RecordGate:
    """Opens and checks values; remembers the good ones until they expire."""

    def __init__(self, membership: RunSecret, clock: Callable[[], float], lowest_port: int) -> None:
        self._membership = membership
        self._clock = clock
        self._lowest_port = lowest_port
        self._passed: OrderedDict[bytes, _Passed] = OrderedDict()
        self.refused = 0  # values that did not pass

    def knows(self, peer: str, value: bytes) -> bool:
        """Whether `open` will be cheap."""
        return _digest(peer, value) in self._passed

    def open(self, peer: str, value: bytes, expires_unix_s: float) -> SignedRecord:
        """The record in `value`, filed under `peer` until `expires_unix_s`.

        Costs about 0.5 ms for a value not seen before. Raises RecordInvalid or AccessError.
        """
        try:
            return self._open(peer, value, expires_unix_s)
        except (RecordInvalid, AccessError):
            self.refused += 1
            raise

    def _open(self, peer: str, value: bytes, expires_unix_s: float) -> SignedRecord:
        digest = _digest(peer, value)
        passed = self._passed.get(digest) or self._verified(peer, value)
        if not math.isfinite(expires_unix_s) or expires_unix_s > passed.last_unix_s + EXPIRY_SLACK_S:
            raise RecordInvalid(f"the record of {peer} is stored for longer than its peer signed")
        self._passed[digest] = passed
        self._passed.move_to_end(digest)
        self._forget()
        return passed.signed

    def _forget(self) -> None:
        """Drop what expired, and what was not seen for longest when there is too much."""
        now = self._clock()
        while self._passed:
            longest_unseen = next(iter(self._passed.values()))
            if len(self._passed) <= limits.RECORDS_HELD and longest_unseen.last_unix_s >= now:
                return
            self._passed.popitem(last=False)

    def _verified(self, peer: str, value: bytes) -> _Passed:
        signed = unseal(value, self._membership.run_id, self._membership.sealing_key)
        record = verify_record(signed, self._membership, self._clock(), self._lowest_port)
        if record.peer != peer:
            raise RecordInvalid(f"a record of {record.peer} is filed under {PeerId(peer[:64])}")
        return _Passed(signed, record.issued_unix_s + min(record.ttl_s, limits.RECORD_TTL_MAX_S))


def _digest(peer: str, value: bytes) -> bytes:
    return hashlib.blake2b(value, key=peer.encode(errors="replace")[:64], digest_size=16).digest()
