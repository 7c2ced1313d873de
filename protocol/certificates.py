"""The three certificates of a run, made and checked: root, token, leaf (P-256, X.509).

    root    self-signed, the owner's; what everybody trusts
    token   an intermediate CA that may sign leaves only; carries run, token id and roles
    leaf    what a peer shows in TLS; carries the peer id and its Ed25519 signature over the leaf's key

A chain alone proves little, since a token's holder can mint any name: `verify_chain` therefore checks
the peer's own signature (the binding) as well. All bytes may come from a stranger: whatever they hold,
only AccessErrors come out. TLS checks the chain a second time; dispatch and records rely on this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from blake3 import blake3
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shoal.protocol import limits
from shoal.protocol.certificate_form import (
    BINDING_OID,
    GRANT_OID,
    LeafBinding,
    ReadCertificate,
    TokenGrant,
    grant_of,
    read_certificate,
    spki,
)
from shoal.protocol.certificate_form import chain_of_pem as chain_of_pem
from shoal.protocol.certificate_form import pem_of as pem_of
from shoal.protocol.errors import (
    BindingInvalid,
    ChainInvalid,
    ProtocolViolation,
    RecordInvalid,
    TokenExpired,
    WrongRun,
)
from shoal.protocol.identity import PeerId, PeerKey, Role, VerifiedPeer, labelled, verify_signature
from shoal.protocol.wire import decode, encode

ROOT_YEARS = 20
LEAF_S = limits.LEAF_HOURS * 3600.0
_BINDING_LABEL = b"leaf binding"


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """A token's certificate, after it was found to be signed by the root."""

    run_id: bytes
    token_id: str  # hex
    roles: frozenset[Role]
    not_before: float  # Unix time
    not_after: float
    public_key: bytes  # SubjectPublicKeyInfo, DER


def make_root(key: ec.EllipticCurvePrivateKey, run_id: bytes, now: float) -> bytes:
    """The owner's self-signed CA, DER. Named by the run, so that tools show which run it is."""
    name = _name(run_id[:4].hex())
    builder = _builder(name, name, key.public_key(), now, now + ROOT_YEARS * 365.25 * 86400)
    constraints = x509.BasicConstraints(ca=True, path_length=1)
    return _sign(builder.add_extension(constraints, critical=True), key)


def make_token_certificate(
    root_key: ec.EllipticCurvePrivateKey,
    root_der: bytes,
    token_key: ec.EllipticCurvePublicKey,
    grant: TokenGrant,
    now: float,
    not_after: float,
) -> bytes:
    """A CA that may sign leaves only, DER. Never outlives the root.

    Key identifiers and key usage are left out to keep the token short; no path needs them.
    """
    root = read_certificate(root_der, "root certificate")
    subject = _name(grant.token_id.hex())
    not_after = min(not_after, root.not_after)
    builder = _builder(subject, root.parsed.subject, token_key, now, not_after)
    constraints = x509.BasicConstraints(ca=True, path_length=0)
    builder = builder.add_extension(constraints, critical=True)
    return _sign(
        builder.add_extension(x509.UnrecognizedExtension(GRANT_OID, encode(grant)), critical=False), root_key
    )


def extend_token_certificate(
    root_key: ec.EllipticCurvePrivateKey, root_der: bytes, token_der: bytes, now: float, not_after: float
) -> bytes:
    """The same key and grant with another end, DER."""
    token = read_certificate(token_der, "token certificate")
    return make_token_certificate(root_key, root_der, token.key, grant_of(token), now, not_after)


def make_leaf(
    token_key: ec.EllipticCurvePrivateKey,
    token_der: bytes,
    leaf_key: ec.EllipticCurvePublicKey,
    peer_key: PeerKey,
    now: float,
) -> bytes:
    """A leaf for 24 hours, or for what is left of the token, DER."""
    token = read_certificate(token_der, "token certificate")
    grant = grant_of(token)
    signature = peer_key.sign(_BINDING_LABEL, _bound(grant, spki(leaf_key)))
    binding = encode(LeafBinding(peer_key.peer, signature))
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    host = x509.SubjectAlternativeName([x509.DNSName(leaf_dns_name(peer_key.peer))])
    not_after = min(now + LEAF_S, token.not_after)
    builder = _builder(_name("leaf"), token.parsed.subject, leaf_key, now, not_after)
    builder = builder.add_extension(usage, critical=True).add_extension(purposes, critical=False)
    builder = builder.add_extension(host, critical=False)
    return _sign(builder.add_extension(x509.UnrecognizedExtension(BINDING_OID, binding), False), token_key)


def leaf_dns_name(peer: PeerId) -> str:
    """The name in a peer's leaf, which TLS compares; peer ids themselves depend on case, DNS names do not."""
    return f"{blake3(peer.encode()).hexdigest()[:32]}.shoal"


def verify_chain(chain_der: Sequence[bytes], root_der: bytes, run_id: bytes, now: float) -> VerifiedPeer:
    """Who shows this chain, checked in full at Unix time `now`.

    The chain is DER: leaf, token certificate, and possibly the root. Raises WrongRun, TokenExpired,
    BindingInvalid, or ChainInvalid for all else. Does not know revocations.
    """
    if not 2 <= len(chain_der) <= limits.CHAIN_LENGTH or any(der != root_der for der in chain_der[2:]):
        raise ChainInvalid(
            f"a chain is a leaf and its token's certificate; this one has {len(chain_der)} certificates"
            + (", the last of them another root" if len(chain_der) == limits.CHAIN_LENGTH else "")
        )
    root, token = (
        read_certificate(root_der, "root certificate"),
        read_certificate(chain_der[1], "token certificate"),
    )
    leaf = read_certificate(chain_der[0], "leaf certificate")
    grant = _require_token(token, root, run_id, now)
    _require_signature(leaf, token)
    if leaf.ca:
        raise ChainInvalid("the leaf is a CA certificate; a token may sign leaves only")
    if leaf.not_after > token.not_after:
        raise ChainInvalid(f"the leaf outlives its token, which ends on {utc(token.not_after)}")
    if leaf.not_after - leaf.not_before > LEAF_S + limits.CLOCK_SKEW_S:
        raise ChainInvalid(f"the leaf is valid for more than {limits.LEAF_HOURS} hours")
    _require_current(leaf, now)
    peer = _require_binding(leaf, grant)
    return VerifiedPeer(peer, grant.known_roles(), grant.token_id.hex(), leaf.not_after)


def verify_token(token_der: bytes, root_der: bytes, run_id: bytes | None, now: float | None) -> VerifiedToken:
    """A token's certificate, checked against its root, the run and the Unix time (None: any).

    Raises WrongRun, TokenExpired or ChainInvalid.
    """
    root, token = (
        read_certificate(root_der, "root certificate"),
        read_certificate(token_der, "token certificate"),
    )
    grant = _require_token(token, root, run_id, now)
    return VerifiedToken(
        run_id=grant.run_id,
        token_id=grant.token_id.hex(),
        roles=grant.known_roles(),
        not_before=token.not_before,
        not_after=token.not_after,
        public_key=token.public_key,
    )


def verify_owner_signature(root_der: bytes, label: bytes, data: bytes, signature: bytes) -> None:
    """Raises RecordInvalid unless the key of this root signed `data` under `label` (ECDSA, SHA-256)."""
    key = read_certificate(root_der, "root certificate").key
    try:
        key.verify(signature, labelled(label, data), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise RecordInvalid(f"the run's owner did not sign this {label.decode(errors='replace')}") from None


def utc(unix_s: float) -> str:
    """A time for people."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _require_token(
    token: ReadCertificate, root: ReadCertificate, run_id: bytes | None, now: float | None
) -> TokenGrant:
    grant = grant_of(token)
    if run_id is not None and grant.run_id != run_id:
        raise WrongRun(f"the token is for run {grant.run_id.hex()[:16]}, this is run {run_id.hex()[:16]}")
    _require_signature(root, root)
    _require_signature(token, root)
    if not root.ca or not token.ca or token.path_length != 0:
        raise ChainInvalid("root and token must be CA certificates, the token's with path length 0")
    if now is None:
        return grant
    _require_current(root, now)
    if now >= token.not_after:
        raise TokenExpired(
            f"token {grant.token_id.hex()} expired on {utc(token.not_after)}, now is {utc(now)}; "
            "the run's owner can extend it or make a new one (shoal token create)"
        )
    _require_current(token, now)
    return grant


def _require_signature(child: ReadCertificate, issuer: ReadCertificate) -> None:
    try:
        child.parsed.verify_directly_issued_by(issuer.parsed)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ChainInvalid(f"the {child.what} is not signed by its {issuer.what}; it is forged") from error


def _require_current(certificate: ReadCertificate, now: float) -> None:
    if not certificate.not_before <= now < certificate.not_after:
        raise ChainInvalid(
            f"the {certificate.what} is valid from {utc(certificate.not_before)} to "
            f"{utc(certificate.not_after)}, now is {utc(now)}; one of the two clocks may be wrong"
        )


def _require_binding(leaf: ReadCertificate, grant: TokenGrant) -> PeerId:
    try:
        binding = decode(LeafBinding, leaf.own.get(BINDING_OID, b""))
        verify_signature(binding.peer, _BINDING_LABEL, _bound(grant, leaf.public_key), binding.signature)
    except ProtocolViolation as error:
        raise BindingInvalid(
            f"no peer vouches for this leaf of token {grant.token_id.hex()}: {error}; "
            "its holder may be posing as another peer"
        ) from error
    if leaf.names != (leaf_dns_name(binding.peer),):
        raise BindingInvalid(f"the leaf of {binding.peer} carries another peer's name")
    return binding.peer


def _bound(grant: TokenGrant, leaf_public_key: bytes) -> bytes:
    """What a peer signs to vouch for a leaf; with the token in it, no other token's holder can reuse it."""
    return grant.run_id + grant.token_id + leaf_public_key


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    now: float,
    not_after: float,
) -> x509.CertificateBuilder:
    """Valid from an hour ago, since clocks differ. Times are whole seconds: X.509 has no more."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number() >> 96)  # 63 bits, short; names and keys tell them apart
        .not_valid_before(datetime.fromtimestamp(int(now - limits.CLOCK_SKEW_S), UTC))
        .not_valid_after(datetime.fromtimestamp(int(not_after), UTC))
    )


def _sign(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> bytes:
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)
