"""Who a peer is: its id, its Ed25519 key, its roles, and what somebody needs in order to dial it.

The peer id is libp2p's: the base58 multihash of the protobuf-wrapped public key, "12D3KooW…". It contains
the public key, so anybody verifies a peer's signatures from its id alone.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import NewType

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shoal.protocol.errors import RecordInvalid, StorageError
from shoal.protocol.private_files import create_private, read_private

PeerId = NewType("PeerId", str)


class Role(enum.StrEnum):
    """What a token may grant. Checked on every dispatch."""

    OWNER = "owner"
    TRAINER = "trainer"
    INFERENCE = "inference"
    OBSERVER = "observer"


HOLDERS = frozenset({Role.OWNER, Role.TRAINER})  # of stages and of copies: others neither train nor serve


@dataclass(frozen=True, slots=True)
class VerifiedPeer:
    """The other end of a connection or the signer of a record, after chain, role and binding held."""

    peer: PeerId
    roles: frozenset[Role]
    token_id: str  # hex; bans and quotas attach here
    not_after: float  # Unix time when its leaf expires


@dataclass(frozen=True, slots=True)
class Contact:
    """All that is needed to dial a peer: its routes and the leaf certificate to pin."""

    peer: PeerId
    addresses: tuple[str, ...]  # "host:port", the order tried
    chain: tuple[bytes, ...]  # DER: leaf, then the token's certificate


# libp2p's encodings of an Ed25519 key. Peer id: identity multihash (0x00, length 0x24) of the protobuf
# PublicKey{type: Ed25519 (0x08 0x01), data: 32 bytes (0x12 0x20)}. A private key's data: seed, public key.
_PEER_PREFIX = bytes.fromhex("002408011220")
_PRIVATE_PREFIX = bytes.fromhex("08011240")
_PEER_CHARACTERS = 64  # an Ed25519 peer id has 52


class PeerKey:
    """A peer's Ed25519 key: its identity. Signs records, its leaf's binding, and libp2p's handshakes."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.peer = peer_of_public_key(key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> PeerKey:
        """A new key in memory."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> PeerKey:
        """The key of a 32-byte seed; for tests and simulations that must repeat."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load_or_create(cls, path: Path) -> PeerKey:
        """The key in `path`; made on first use, mode 0600. p2pd reads the same file.

        Raises StorageError if others may read it, if it is damaged, or if the disk refuses.
        """
        data = read_private(path, len(_PRIVATE_PREFIX) + 64)
        if data is None:
            key = cls.generate()
            if create_private(path, key.libp2p_identity()):
                return key
            data = read_private(path, len(_PRIVATE_PREFIX) + 64) or b""  # another process was faster
        seed = data[len(_PRIVATE_PREFIX) : len(_PRIVATE_PREFIX) + 32]
        if len(seed) == 32 and (key := cls.from_seed(seed)).libp2p_identity() == data:
            return key
        raise StorageError(
            f"{path} is not an Ed25519 peer key ({len(data)} bytes); restore it from a backup, or delete "
            "it to get a new identity"
        )

    def sign(self, label: bytes, data: bytes) -> bytes:
        """64 bytes that `verify_signature` accepts for the same label and data, and for no other label."""
        return self._key.sign(labelled(label, data))

    def libp2p_identity(self) -> bytes:
        """The PrivateKey protobuf that p2pd takes as its identity file. A secret."""
        return _PRIVATE_PREFIX + self._key.private_bytes_raw() + self._key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"PeerKey({self.peer})"


def labelled(label: bytes, data: bytes) -> bytes:
    """What is really signed: the label says what for, its length where the data starts.

    The prefix keeps these messages apart from all else that the same keys sign (libp2p handshakes, X.509).
    """
    return b"shoal\x00" + bytes((len(label),)) + label + data


def peer_of_public_key(public_key: bytes) -> PeerId:
    """The peer id of a raw 32-byte Ed25519 public key."""
    return PeerId(base58.b58encode(_PEER_PREFIX + public_key).decode())


def public_key_of(peer: PeerId) -> bytes:
    """The raw 32-byte Ed25519 public key inside a peer id. Raises RecordInvalid for any other text."""
    try:
        raw = base58.b58decode(peer) if len(peer) <= _PEER_CHARACTERS else b""
    except ValueError:
        raw = b""
    public_key = raw[len(_PEER_PREFIX) :]
    if len(public_key) != 32 or peer_of_public_key(public_key) != peer:
        raise RecordInvalid(f"{peer[:_PEER_CHARACTERS]!r} is not the id of an Ed25519 peer")
    return public_key


def verify_signature(peer: PeerId, label: bytes, data: bytes, signature: bytes) -> None:
    """Raises RecordInvalid unless `peer` signed `data` under `label`."""
    key = Ed25519PublicKey.from_public_bytes(public_key_of(peer))
    try:
        key.verify(signature, labelled(label, data))
    except InvalidSignature:
        raise RecordInvalid(f"{peer} did not sign this {label.decode(errors='replace')}") from None
