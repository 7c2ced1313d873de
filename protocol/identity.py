"""Who a peer is: its id, its Ed25519 key, its roles, and what somebody needs in order to dial it.

The peer id is libp2p's: the base58 multihash of the protobuf-wrapped public key, "12D3KooW…". It contains
the public key, so anybody verifies a peer's signatures from its id alone.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NewType

PeerId = NewType("PeerId", str)


class Role(enum.StrEnum):
    """What a token may grant. Checked on every dispatch."""

    OWNER = "owner"
    TRAINER = "trainer"
    INFERENCE = "inference"
    OBSERVER = "observer"


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
