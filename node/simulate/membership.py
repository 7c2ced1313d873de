"""Members without certificates: simulated peers are who they say they are.

Certificates are drawn at random and take time to verify; with these the same seed gives the same bytes.
Records are still signed (Ed25519 signatures are a function of key and text) and sealed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blake3 import blake3

from shoal.protocol.admission import Membership
from shoal.protocol.amendments import AmendmentBook
from shoal.protocol.errors import ChainInvalid
from shoal.protocol.identity import PeerId, PeerKey, Role, VerifiedPeer
from shoal.protocol.revocation import RevocationBook

_CHAIN_BYTES = (620, 480)  # about what a leaf and a token's certificate take
ROLES = frozenset({Role.TRAINER})


class PaperMembership(Membership):
    """A member of a simulated run; its chain is its name, as long as real certificates are."""

    def __init__(self, run_id: bytes, key: PeerKey, clock: Callable[[], float]) -> None:
        self.key = key
        self.revocations = RevocationBook(run_id, b"")
        self.amendments = AmendmentBook(run_id, b"")
        self.renewed = []
        self._run_id = run_id
        self._clock = clock
        self.me = VerifiedPeer(key.peer, ROLES, key.peer, float("inf"))
        self.chain = tuple(key.peer.encode().ljust(size) for size in _CHAIN_BYTES)

    @property
    def run_id(self) -> bytes:
        return self._run_id

    @property
    def sealing_key(self) -> bytes:
        return self._run_id

    def verify(self, chain: Sequence[bytes]) -> VerifiedPeer:
        if len(chain) != len(_CHAIN_BYTES) or chain[0].strip() != chain[1].strip():
            raise ChainInvalid("this is no chain of a simulated peer")
        peer = PeerId(chain[0].decode("ascii").strip())
        return VerifiedPeer(peer, ROLES, peer, float("inf"))


def simulated_key(seed: int, number: int) -> PeerKey:
    """The key of a simulated peer."""
    return PeerKey.from_seed(blake3(f"shoal simulation {seed}/{number}".encode()).digest())
