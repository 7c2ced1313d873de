"""Membership: what this peer shows to others, and how it judges what they show.

Made by the daemon from a join token and the peer's key; used by the transport (its credentials, and
`verify` before anything is dispatched), by the dialler (`verify_leaf_for_dial`) and by records. Lives in
memory, asks no server. `JoinToken` and `OwnerKey` are importable from here too: admission is one topic.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from shoal.protocol import limits
from shoal.protocol.amendments import AmendmentBook
from shoal.protocol.certificates import leaf_dns_name, make_leaf, pem_of, utc, verify_chain, verify_token
from shoal.protocol.certificates import verify_owner_signature as verify_owner_signature
from shoal.protocol.errors import BindingInvalid, TokenExpired, TokenInvalid, TokenRevoked
from shoal.protocol.identity import Contact, PeerKey, VerifiedPeer
from shoal.protocol.join_token import JoinToken as JoinToken
from shoal.protocol.join_token import read_token as read_token
from shoal.protocol.owner_key import OwnerKey as OwnerKey
from shoal.protocol.revocation import RevocationBook


@dataclass(frozen=True, slots=True)
class Pin:
    """How to recognise a peer when dialling it."""

    verified: VerifiedPeer
    leaf_pem: bytes  # the only trust anchor of the connection
    dns_name: str  # the name TLS has to compare, whatever address was dialled


class Membership:
    """This peer's credentials in one run.

    `me`, `chain` (DER: leaf, token certificate) and the PEM forms are replaced by `renew`, which then calls
    every function in `renewed`. `clock` gives Unix seconds.
    """

    def __init__(
        self,
        token: JoinToken,
        key: PeerKey,
        clock: Callable[[], float],
        revocations: RevocationBook | None = None,
        amendments: AmendmentBook | None = None,
    ) -> None:
        """Raises TokenExpired, or ChainInvalid if this machine's clock lies before the token's time."""
        self.token = token
        self.key = key
        self.revocations = revocations or RevocationBook(token.run_id, token.root_der)
        self.amendments = amendments or AmendmentBook(token.run_id, token.root_der)
        self.renewed: list[Callable[[], None]] = []
        self._clock = clock
        self._known: OrderedDict[bytes, VerifiedPeer] = OrderedDict()
        self._issue_leaf()

    @property
    def run_id(self) -> bytes:
        """32 bytes."""
        return self.token.run_id

    @property
    def sealing_key(self) -> bytes:
        """32 bytes that all members share; what the directory is sealed with."""
        return self.token.sealing_key

    @property
    def root_pem(self) -> bytes:
        return pem_of(self.token.root_der)

    @property
    def leaf_pem(self) -> bytes:
        return pem_of(self.chain[0])

    @property
    def chain_pem(self) -> bytes:
        """Leaf and token certificate, as TLS shows them."""
        return b"".join(pem_of(der) for der in self.chain)

    @property
    def leaf_key_pem(self) -> bytes:
        """A secret; it exists in memory only and changes with every leaf."""
        return self._leaf_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def renew_at(self) -> float:
        """Unix time at which two thirds of the leaf's life are over."""
        return self._issued_at + (self.me.not_after - self._issued_at) * 2 / 3

    def renew_due(self) -> bool:
        """Whether `renew` should be called now: the time has come, and the token allows a longer life."""
        return self._clock() >= self.renew_at and self.me.not_after < self.token.not_after

    def renew(self) -> None:
        """A new leaf with a new key; then tell those in `renewed`. Raises TokenExpired."""
        self._issue_leaf()
        for notify in self.renewed:
            notify()

    def adopt_token_certificate(self, certificate_der: bytes) -> bool:
        """Take over the owner's extension of this peer's token, and renew; False if it brings nothing longer.

        Raises TokenInvalid if it is for another token, ChainInvalid, WrongRun or TokenExpired.
        """
        granted = verify_token(certificate_der, self.token.root_der, self.run_id, self._clock())
        if granted.token_id != self.token.token_id:
            raise TokenInvalid(f"this extends token {granted.token_id}, not {self.token.token_id}")
        if granted.not_after <= self.token.not_after:
            return False
        token = self.token
        self.token = JoinToken.of(
            token.root_der, certificate_der, token.key, token.sealing_key, token.bootstrap
        )
        self.renew()
        return True

    def verify(self, chain: Sequence[bytes]) -> VerifiedPeer:
        """Who shows this chain (DER), if that peer is a member now.

        Raises ChainInvalid, BindingInvalid, WrongRun, TokenExpired or TokenRevoked. About 0.3 ms for a new
        chain; known ones are remembered until they expire.
        """
        now = self._clock()
        digest = _digest(chain)
        verified = self._known.get(digest)
        if verified is None or verified.not_after <= now:
            self._known.pop(digest, None)
            verified = verify_chain(chain, self.token.root_der, self.run_id, now)
            self._known[digest] = verified
            if len(self._known) > limits.VERIFIED_CHAINS:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(digest)
        if self.revocations.is_revoked(verified):
            raise TokenRevoked(
                f"{verified.peer} or its token {verified.token_id} is revoked by the run's owner "
                f"(revocation list {self.revocations.version}); only a new token helps"
            )
        return verified

    def verify_leaf_for_dial(self, contact: Contact) -> Pin:
        """What to pin when dialling. Raises what `verify` raises, BindingInvalid for another peer's chain."""
        verified = self.verify(contact.chain)
        if verified.peer != contact.peer:
            raise BindingInvalid(f"the contact of {contact.peer} carries the certificates of {verified.peer}")
        return Pin(verified, pem_of(contact.chain[0]), leaf_dns_name(verified.peer))

    def __repr__(self) -> str:
        return f"Membership({self.me.peer}, run {self.run_id.hex()[:16]}, token {self.token.token_id})"

    def _issue_leaf(self) -> None:
        now = self._clock()
        token = self.token
        if now >= token.not_after:
            raise TokenExpired(
                f"your token {token.token_id} expired on {utc(token.not_after)}, and it is {utc(now)} here; "
                "ask the run's owner for a new one (shoal token create)"
            )
        leaf_key = ec.generate_private_key(ec.SECP256R1())
        leaf = make_leaf(token.key, token.certificate_der, leaf_key.public_key(), self.key, now)
        chain = (leaf, token.certificate_der)
        self.me: VerifiedPeer = verify_chain(chain, token.root_der, token.run_id, now)
        self.chain: tuple[bytes, ...] = chain
        self._leaf_key = leaf_key
        self._issued_at = now


def _digest(chain: Sequence[bytes]) -> bytes:
    hasher = blake3(len(chain).to_bytes(8, "big"))
    for der in chain:
        hasher.update(len(der).to_bytes(8, "big")).update(der)
    return hasher.digest()
