"""What a certificate says, read once and bounded; nothing of it is proven.

Shoal's two X.509 extensions are defined here: the grant in a token's certificate and the binding in a
leaf. `certificates` makes certificates and checks chains with this. Bytes may come from a stranger:
whatever they hold, only ChainInvalid comes out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtensionOID, SignatureAlgorithmOID

from shoal.protocol import limits
from shoal.protocol.errors import ChainInvalid, ProtocolViolation
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.wire import Digest, Items, Length, decode, wire_message

TOKEN_ID_BYTES = 8

# 2.25 is the arc of UUIDs, open to all; this one was drawn for Shoal.
_ARC = "2.25.187584265058691932039447698306543676307"
GRANT_OID = x509.ObjectIdentifier(f"{_ARC}.1")
BINDING_OID = x509.ObjectIdentifier(f"{_ARC}.2")
_UNDERSTOOD = {
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.KEY_USAGE,
    ExtensionOID.EXTENDED_KEY_USAGE,
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    GRANT_OID,
    BINDING_OID,
}
_UNREADABLE = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
    Warning,  # where warnings are errors, what the library would only warn about is refused too
)


@wire_message
@dataclass(frozen=True, slots=True)
class TokenGrant:
    """The extension of a token's certificate: what its holder may do, and where."""

    run_id: Digest
    token_id: Annotated[bytes, Length(TOKEN_ID_BYTES, TOKEN_ID_BYTES)]
    roles: Annotated[tuple[Annotated[str, Length(1, 16)], ...], Items(8)]

    def known_roles(self) -> frozenset[Role]:
        """Roles of a later version grant nothing here."""
        return frozenset(role for role in Role if role in self.roles)


@wire_message
@dataclass(frozen=True, slots=True)
class LeafBinding:
    """The extension of a leaf: the peer, and its signature over run, token and the leaf's public key."""

    peer: Annotated[PeerId, Length(46, 64)]
    signature: Annotated[bytes, Length(64, 64)]


@dataclass(frozen=True, slots=True)
class ReadCertificate:
    """A certificate's fields, parsed completely."""

    parsed: x509.Certificate
    what: str
    key: ec.EllipticCurvePublicKey
    public_key: bytes
    not_before: float
    not_after: float
    ca: bool
    path_length: int | None
    names: tuple[str, ...]
    own: dict[x509.ObjectIdentifier, bytes]  # our extensions


def read_certificate(der: bytes, what: str) -> ReadCertificate:
    """Parse everything here and now: the library is lazy, and errors must not surface later."""
    if len(der) > limits.CERTIFICATE_BYTES:
        raise ChainInvalid(f"the {what} has {len(der)} bytes, {limits.CERTIFICATE_BYTES} are allowed")
    try:
        return _parse(der, what)
    except _UNREADABLE as error:
        raise ChainInvalid(f"the {what} cannot be read ({len(der)} bytes): {error}") from error


def _parse(der: bytes, what: str) -> ReadCertificate:
    parsed = x509.load_der_x509_certificate(der)
    if parsed.signature_algorithm_oid != SignatureAlgorithmOID.ECDSA_WITH_SHA256:
        raise ValueError("it is not signed with ECDSA and SHA-256")
    if not der.endswith(b"\x00" + parsed.signature):  # the parser lets a bit string claim unused bits
        raise ValueError("its signature is not encoded as DER")
    key = parsed.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("its key is not a P-256 key")
    ca, path_length, names = False, None, list[str]()
    own: dict[x509.ObjectIdentifier, bytes] = {}
    for extension in parsed.extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:
            raise ValueError(f"critical extension {extension.oid.dotted_string} is unknown")
        match extension.value:
            case x509.BasicConstraints():
                ca, path_length = extension.value.ca, extension.value.path_length
            case x509.SubjectAlternativeName():
                names = [str(name.value) for name in extension.value]
            case x509.UnrecognizedExtension():
                own[extension.oid] = extension.value.value
    return ReadCertificate(
        parsed=parsed,
        what=what,
        key=key,
        public_key=spki(key),
        not_before=parsed.not_valid_before_utc.timestamp(),
        not_after=parsed.not_valid_after_utc.timestamp(),
        ca=ca,
        path_length=path_length,
        names=tuple(names),
        own=own,
    )


def grant_of(token: ReadCertificate) -> TokenGrant:
    """What a token's certificate grants. Raises ChainInvalid if it is not one."""
    try:
        return decode(TokenGrant, token.own.get(GRANT_OID, b""))
    except ProtocolViolation as error:
        raise ChainInvalid(f"the {token.what} grants nothing: {error}") from error


def pem_of(der: bytes) -> bytes:
    """A certificate as PEM, as TLS libraries want it. Raises ChainInvalid."""
    return read_certificate(der, "certificate").parsed.public_bytes(Encoding.PEM)


def chain_of_pem(*pems: bytes) -> tuple[bytes, ...]:
    """The DER certificates of PEM texts, in order, each once. Raises ChainInvalid.

    gRPC's auth_context gives the leaf as `x509_pem_cert` and the rest as `x509_pem_cert_chain` (which, on
    a client, repeats the leaf): pass both, in this order.
    """
    pem = b"".join(pems)
    if len(pem) > 2 * (limits.CHAIN_LENGTH + 1) * limits.CERTIFICATE_BYTES:
        raise ChainInvalid(f"the peer shows {len(pem)} bytes of certificates")
    try:
        parsed = x509.load_pem_x509_certificates(pem)
        return tuple(dict.fromkeys(certificate.public_bytes(Encoding.DER) for certificate in parsed))
    except _UNREADABLE as error:
        raise ChainInvalid(f"the peer's certificates cannot be read: {error}") from error


def spki(key: ec.EllipticCurvePublicKey) -> bytes:
    """SubjectPublicKeyInfo, DER: how public keys are compared and bound."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
