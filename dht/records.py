"""Peer records: signed by their peer, sealed for the run, and admitted only in order.

`sign_record` makes what `Directory.publish` spreads; `seal` and `unseal` hide it from those without the run's
key; `verify_record` checks one by itself; `RecordBook` (kept by the directory's users) admits records in
sequence, so that a replay never undoes news.
"""

from __future__ import annotations

import functools
import ipaddress
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from shoal.dht.directory import PeerRecord, SignedRecord
from shoal.protocol import limits
from shoal.protocol.errors import BindingInvalid, MessageInvalid, MessageTooLarge, RecordInvalid, WrongRole
from shoal.protocol.identity import HOLDERS, PeerId, PeerKey, VerifiedPeer, verify_signature
from shoal.protocol.wire import decode, encode

SIGNATURE_LABEL = b"shoal record"
SEAL_LABEL = b"shoal sealed record\x00"
NONCE_BYTES = 12
SEALED_BYTES = limits.RECORD_BYTES + 128  # nonce 12, tag 16, signature 66 and field headers
_KEPT = 2048  # decoded and checked records: directory, roster and book look at the same bytes
LOWEST_PORT = 1024  # below are the system's own services: nobody shall make peers knock there

_HOST_NAME = re.compile(r"(?=.{1,120}\Z)[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?\Z")


class Verifier(Protocol):
    """The part of `Membership` that records need."""

    @property
    def run_id(self) -> bytes: ...

    def verify(self, chain: tuple[bytes, ...]) -> VerifiedPeer:
        """Who the certificates speak of. Raises AccessError."""


def sign_record(record: PeerRecord, key: PeerKey, run_id: bytes) -> SignedRecord:
    """`record` under its own peer's signature, bound to the run. Raises MessageTooLarge or MessageInvalid."""
    if record.peer != key.peer:
        raise RecordInvalid(f"a record of {record.peer} can only be signed by it, not by {key.peer}")
    encoded = encode(record)
    if len(encoded) > limits.RECORD_BYTES:
        raise MessageTooLarge(f"the record takes {len(encoded)} of {limits.RECORD_BYTES} bytes")
    return SignedRecord(encoded, key.sign(SIGNATURE_LABEL, run_id + encoded))


def seal(
    signed: SignedRecord, run_id: bytes, sealing_key: bytes, nonce_source: Callable[[int], bytes]
) -> bytes:
    """Nonce and ChaCha20-Poly1305 ciphertext of a record, at most SEALED_BYTES.

    `nonce_source(n)` gives n random bytes: 96 random bits under one key for the life of a run are safe for
    2**32 records (RFC 8439, section 4, and the birthday bound).
    """
    nonce = nonce_source(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(sealing_key).encrypt(nonce, encode(signed), SEAL_LABEL + run_id)


def unseal(sealed: bytes, run_id: bytes, sealing_key: bytes) -> SignedRecord:
    """The record that `seal` hid. Raises RecordInvalid for anything sealed otherwise."""
    if not NONCE_BYTES < len(sealed) <= SEALED_BYTES:
        raise RecordInvalid(f"a sealed record of {len(sealed)} bytes, {SEALED_BYTES} allowed")
    cipher = ChaCha20Poly1305(sealing_key)
    try:
        plain = cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], SEAL_LABEL + run_id)
        return decode(SignedRecord, plain)
    except InvalidTag:
        raise RecordInvalid("this record was not sealed with the run's key") from None
    except (MessageInvalid, MessageTooLarge) as error:
        raise RecordInvalid(f"sealed by a member, but not a record: {error}") from error


def verify_record(
    signed: SignedRecord, membership: Verifier, now: float, lowest_port: int = LOWEST_PORT
) -> PeerRecord:
    """What the record says, after every check that needs no memory; its texts stripped to what prints.

    `now` is Unix time in seconds. About 0.3 ms plus the chain. Raises RecordInvalid for size, encoding,
    signature, times and addresses; AccessError for the chain, and for stages that its token does not grant:
    others would send their work to an inference client, which may not even answer.
    """
    record = decoded(signed)
    _require_signature(record.peer, membership.run_id + signed.record, signed.signature)
    if record.issued_unix_s > now + limits.RECORD_FUTURE_S:
        ahead_s = record.issued_unix_s - now
        raise RecordInvalid(f"the record of {record.peer} is from {ahead_s:.0f} s ahead; one clock is wrong")
    if record.issued_unix_s + record.ttl_s <= now:
        raise RecordInvalid(
            f"the record of {record.peer} expired; it was issued at {record.issued_unix_s:.0f}"
        )
    for address in record.addresses:
        check_address(address, lowest_port)
    proven = membership.verify(record.chain)
    if proven.peer != record.peer:
        raise BindingInvalid(f"the record of {record.peer} carries the certificate of {proven.peer}")
    if record.stages and not proven.roles & HOLDERS:
        raise WrongRole(f"{record.peer} says that it holds a stage, and its token does not let it train")
    return replace(
        record,
        name=_printable(record.name),
        device=_printable(record.device),
        version=_printable(record.version),
    )


def check_address(address: str, lowest_port: int = LOWEST_PORT) -> None:
    """Raises RecordInvalid unless `address` is "host:port" that a peer may be asked to dial."""
    host, colon, port = address.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()) or not lowest_port <= int(port[:6]) <= 65535:
        raise RecordInvalid(f"{address[:128]!r} is not host:port with a port of {lowest_port} to 65535")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        number = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        if bracketed or not _HOST_NAME.match(host):
            raise RecordInvalid(f"{address[:128]!r} does not name a host") from None
        return
    if (number.version == 6) != bracketed or number.is_unspecified or number.is_multicast:
        raise RecordInvalid(f"{address[:128]!r} is not the address of one host")


@dataclass(frozen=True, slots=True)
class _Held:
    signed: SignedRecord
    record: PeerRecord

    @property
    def order(self) -> tuple[int, int]:
        return self.record.incarnation, self.record.sequence

    @property
    def expires_unix_s(self) -> float:
        return self.record.issued_unix_s + self.record.ttl_s


class RecordBook:
    """The newest record of each peer. Bounded: the one refreshed longest ago makes room."""

    def __init__(
        self, membership: Verifier, capacity: int = limits.RECORDS_HELD, lowest_port: int = LOWEST_PORT
    ) -> None:
        self._membership = membership
        self._capacity = capacity
        self._lowest_port = lowest_port
        self._held: OrderedDict[PeerId, _Held] = OrderedDict()  # longest not refreshed first

    def admit(self, signed: SignedRecord, now: float) -> PeerRecord:
        """The verified record, now held. The same bytes again are admitted again, at the cost of their chain.

        Raises what `verify_record` raises, and RecordInvalid for one that is older than the one held
        (replayed, or overtaken), and for two different ones with one sequence.
        """
        claimed = decoded(signed)
        held = self._held.get(claimed.peer)
        if held is not None and held.signed == signed and held.expires_unix_s > now:
            self._membership.verify(held.record.chain)  # may be revoked by now
            return held.record
        record = verify_record(signed, self._membership, now, self._lowest_port)
        entry = _Held(signed, record)
        if held is not None and entry.order <= held.order:
            kind = "older than" if entry.order < held.order else "numbered as but different from"
            raise RecordInvalid(
                f"the record of {record.peer} {entry.order} is {kind} the one held {held.order}"
            )
        self._held[record.peer] = entry
        self._held.move_to_end(record.peer)
        if len(self._held) > self._capacity:
            self._held.popitem(last=False)
        return record

    def get(self, peer: PeerId) -> PeerRecord | None:
        """The newest record of `peer`, live or not."""
        held = self._held.get(peer)
        return None if held is None else held.record

    def signed(self, peer: PeerId) -> SignedRecord | None:
        """The same as its peer signed it."""
        held = self._held.get(peer)
        return None if held is None else held.signed

    def live(self, now: float) -> tuple[PeerRecord, ...]:
        """The records that have not expired at Unix time `now`.

        Expired ones stay until no older record of theirs can be live, so that none can be replayed.
        """
        horizon = now - limits.RECORD_TTL_MAX_S
        for peer in [peer for peer, held in self._held.items() if held.record.issued_unix_s < horizon]:
            del self._held[peer]
        return tuple(held.record for held in self._held.values() if held.expires_unix_s > now)

    def __len__(self) -> int:
        return len(self._held)


def decoded(signed: SignedRecord) -> PeerRecord:
    """What the record says, unverified. Raises RecordInvalid."""
    return _decoded(signed.record)


@functools.lru_cache(maxsize=_KEPT)
def _require_signature(peer: PeerId, text: bytes, signature: bytes) -> None:
    verify_signature(peer, SIGNATURE_LABEL, text, signature)


@functools.lru_cache(maxsize=_KEPT)
def _decoded(record: bytes) -> PeerRecord:
    if len(record) > limits.RECORD_BYTES:
        raise RecordInvalid(f"a record of {len(record)} bytes, {limits.RECORD_BYTES} allowed")
    try:
        return decode(PeerRecord, record)
    except (MessageInvalid, MessageTooLarge) as error:
        raise RecordInvalid(f"not a record: {error}") from error


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable()).strip()
