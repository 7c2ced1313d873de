"""Envelope: what makes a DHT call one between members. `guarded_p2p` puts every call and answer into one.

A call is encrypted with a key that only holders of the run's sealing key can derive, and only for this
caller, this callee and this method; libp2p proves who the caller is. So a stranger's call fails to open
before a byte of it is parsed, and nobody can replay or redirect another's. An answer is tied to its call.

What it does not do: the sealing key is shared, so somebody whose token was revoked can still make calls. What
such a caller may then write is limited by the record gate (own records, valid chain), and what it reads is
where members can be dialled: they refuse it there.

The header carries addresses, since p2pd's own peer routing is switched off: it would tell anybody who
connects which peers exist.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Annotated

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from shoal.dht.directory import PeerIdText
from shoal.protocol import limits
from shoal.protocol.errors import AccessError, FrameInvalid, MessageInvalid, MessageTooLarge
from shoal.protocol.identity import PeerId
from shoal.protocol.wire import Items, Length, decode, encode, wire_message

NEIGHBOURS = 64
BODY_BYTES = 3 * limits.MIB  # p2pd's own cap is 4 MiB, and passing that one hangs the caller
_NONCE_BYTES = 12
_LENGTH_BYTES = 4

Multiaddr = Annotated[str, Length(3, 160)]


@wire_message
@dataclass(frozen=True, slots=True)
class Neighbour:
    """Where somebody whom the callee knows can be dialled."""

    peer: PeerIdText
    multiaddrs: Annotated[tuple[Multiaddr, ...], Items(4)]


@wire_message
@dataclass(frozen=True, slots=True)
class CallHeader:
    """What goes with every DHT call and answer."""

    multiaddrs: Annotated[tuple[Multiaddr, ...], Items(limits.ADDRESSES_PER_PEER)]  # of the sender
    neighbours: Annotated[tuple[Neighbour, ...], Items(NEIGHBOURS)] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """One direction of one call: who, to whom, and for what."""

    sender: PeerId
    receiver: PeerId
    purpose: bytes


class Envelope:
    """Seals and opens calls of one run. About 0.1 ms each."""

    def __init__(self, run_id: bytes, sealing_key: bytes) -> None:
        self._run_id = run_id
        self._sealing_key = sealing_key

    def seal(self, line: Line, header: CallHeader, body: bytes) -> bytes:
        """The bytes to send. Raises MessageTooLarge for a body over BODY_BYTES."""
        if len(body) > BODY_BYTES:
            raise MessageTooLarge(f"a DHT message of {len(body)} bytes, {BODY_BYTES} allowed")
        packed = encode(header)
        plain = len(packed).to_bytes(_LENGTH_BYTES, "big") + packed + body
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher(line).encrypt(nonce, plain, None)

    def open(self, line: Line, sealed: bytes) -> tuple[CallHeader, bytes]:
        """Raises AccessError if not sealed for this line with the run's key, FrameInvalid for nonsense."""
        if len(sealed) > BODY_BYTES + limits.HEADER_BYTES + limits.KIB:
            raise FrameInvalid(f"a DHT message of {len(sealed)} bytes, {BODY_BYTES} allowed")
        try:
            plain = self._cipher(line).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None)
        except (InvalidTag, ValueError):
            raise AccessError("refused: DHT calls need a token of this run") from None
        end = _LENGTH_BYTES + int.from_bytes(plain[:_LENGTH_BYTES], "big")
        try:
            return decode(CallHeader, plain[_LENGTH_BYTES:end]), plain[end:]
        except (MessageInvalid, MessageTooLarge) as error:
            raise FrameInvalid(f"a DHT message with a bad header: {error}") from error

    def _cipher(self, line: Line) -> ChaCha20Poly1305:
        parts = (self._run_id, line.sender.encode(), line.receiver.encode(), line.purpose)
        derived = hashlib.blake2b(key=self._sealing_key, digest_size=32, person=b"shoal dht call")
        for part in parts:
            derived.update(len(part).to_bytes(2, "big") + part)
        return ChaCha20Poly1305(derived.digest())


def answering(line: Line, call: bytes) -> Line:
    """The line of the answer to a sealed call."""
    return Line(line.receiver, line.sender, b"answer\x00" + line.purpose + b"\x00" + call[:_NONCE_BYTES])
