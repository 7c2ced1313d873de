"""The world of the trust tests: one run with its owner, a clock to set, and members made in one line."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from shoal.protocol.admission import JoinToken, Membership, OwnerKey
from shoal.protocol.certificate_form import BINDING_OID, LeafBinding
from shoal.protocol.certificates import leaf_dns_name
from shoal.protocol.identity import PeerId, PeerKey, Role
from shoal.protocol.wire import encode

NOW = 1_800_000_000.0
DAY = 86_400.0
RUN = bytes(range(32))
ADDRESS = "/ip4/203.0.113.77/tcp/31337/p2p/12D3KooWPSKyTB3fHpTMSHpn4bhF8AmNzHmvFb3FVenvGKFH7ydr"


class World:
    """One run: its owner, a clock to set, and members made in one line."""

    def __init__(self, directory: Path, run_id: bytes = RUN, now: float = NOW) -> None:
        self.now = now
        self.owner = OwnerKey.create(directory, run_id, "test", now)

    def token(self, *roles: Role, ttl_s: float = 7 * DAY) -> JoinToken:
        return self.owner.issue_token(roles or (Role.TRAINER,), ttl_s, [ADDRESS], "volunteer", self.now)

    def member(self, token: JoinToken | None = None, key: PeerKey | None = None) -> Membership:
        return Membership(token or self.token(), key or PeerKey.generate(), lambda: self.now)


def forged_leaf(
    token: JoinToken,
    claimed: PeerId,
    signature: bytes,
    *,
    ca: bool = False,
    days: float = 1.0,
    key: ec.EllipticCurvePrivateKey | None = None,
) -> bytes:
    """A leaf under a real token that says what a cheat likes."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    issuer = x509.load_der_x509_certificate(token.certificate_der)
    start = issuer.not_valid_before_utc
    builder = (
        x509.CertificateBuilder()
        .subject_name(issuer.subject)
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(start)
        .not_valid_after(start + days * (issuer.not_valid_after_utc - start) / 8)
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(leaf_dns_name(claimed))]), critical=False)
        .add_extension(
            x509.UnrecognizedExtension(BINDING_OID, encode(LeafBinding(claimed, signature))), critical=False
        )
    )
    return builder.sign(token.key, hashes.SHA256()).public_bytes(Encoding.DER)
