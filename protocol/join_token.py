"""The join token: the string a volunteer pastes. It is a signing key, so it is a secret.

    shoal1-<base64url of:  bytes in all (2) | checksum (6) | deflated TokenBody>

The length stands in front, so that a cut paste is told from a mistyped one. Deflate starts from a fixed
dictionary of what all tokens share; it belongs to the version `shoal1` and must never change.
The root certificate travels whole: nothing has to be fetched before the first handshake.
"""

from __future__ import annotations

import base64
import os
import re
import stat
import sys
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TextIO

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from shoal.protocol import limits
from shoal.protocol.certificates import verify_token
from shoal.protocol.errors import AccessError, ProtocolViolation, TokenInvalid, UsageError
from shoal.protocol.identity import Role
from shoal.protocol.wire import Items, Length, decode, encode, wire_message

TOKEN_PREFIX = "shoal1-"
_CHECKSUM_BYTES = 6
_FRONT_BYTES = 2 + _CHECKSUM_BYTES
_LEAST_BYTES = _FRONT_BYTES + 320  # two public keys, two signatures and two secrets do not deflate
_BODY_BYTES = 8 * limits.KIB  # inflated; two certificates and eight addresses take 3 KiB
_QUOTES = "\"'`<>\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb"
_AGAIN = "\ncopy it whole, as the owner's shoal up or shoal token create printed it"
_Certificate = Annotated[bytes, Length(1, limits.CERTIFICATE_BYTES)]
_Secret = Annotated[bytes, Length(32, 32)]
_DICTIONARY = (
    bytes.fromhex(
        # names and dates; a P-256 public key; CA extensions; the grant; an ECDSA signature; the outer frames
        "30133111300f06035504030c08170d3236303130313030303030305a170d301b3119301706035504030c10"
        "3059301306072a8648ce3d020106082a8648ce3d03010703420004"
        "a316301430120603551d130101ff040830060101ff020101a36f306d30120603551d130101ff040830060101ff020100"
        "3057061569829a9fb594c7b0f2b1af9abf97e5c48ec1d71301043e0a2012081a07"
        "300a06082a8648ce3d04030203480030450221000347003044022000 02200220"
        "308201303081d8a0030201020208308201953082013ba003020102020812"
    )
    + b"observerinferencetrainer/dns4/quic-v1/udp//ip6/127.0.0.1/ip4/tcp/31337/p2p/12D3KooW"
)


@wire_message
@dataclass(frozen=True, slots=True)
class TokenBody:
    """What a token's text holds."""

    root: _Certificate
    certificate: _Certificate
    key: _Secret = field(repr=False)  # the P-256 scalar, big-endian
    sealing_key: _Secret = field(repr=False)
    bootstrap: Annotated[tuple[Annotated[str, Length(1, 256)], ...], Items(limits.BOOTSTRAP_ADDRESSES)]


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A token, its certificate already found to be signed by its root and to fit its key."""

    run_id: bytes  # 32
    token_id: str  # hex
    roles: frozenset[Role]
    not_after: float  # Unix time
    root_der: bytes = field(repr=False)
    certificate_der: bytes = field(repr=False)
    key: ec.EllipticCurvePrivateKey = field(repr=False, compare=False)
    sealing_key: bytes = field(repr=False)  # 32
    bootstrap: tuple[str, ...]

    @classmethod
    def of(
        cls,
        root_der: bytes,
        certificate_der: bytes,
        key: ec.EllipticCurvePrivateKey,
        sealing_key: bytes,
        bootstrap: Sequence[str],
    ) -> JoinToken:
        """A token of its parts, whatever the time. Raises TokenInvalid."""
        try:
            granted = verify_token(certificate_der, root_der, run_id=None, now=None)
        except AccessError as error:
            raise TokenInvalid(f"the token contradicts itself: {error}") from error
        own = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if own != granted.public_key:
            raise TokenInvalid("the token contradicts itself: its certificate is for another key")
        return cls(
            run_id=granted.run_id,
            token_id=granted.token_id,
            roles=granted.roles,
            not_after=granted.not_after,
            root_der=root_der,
            certificate_der=certificate_der,
            key=key,
            sealing_key=sealing_key,
            bootstrap=tuple(bootstrap),
        )

    def encode(self) -> str:
        """The text to paste, about 800 characters. A secret."""
        scalar = self.key.private_numbers().private_value.to_bytes(32, "big")
        body = encode(
            TokenBody(self.root_der, self.certificate_der, scalar, self.sealing_key, self.bootstrap)
        )
        deflate = zlib.compressobj(9, wbits=-15, zdict=_DICTIONARY)
        packed = deflate.compress(body) + deflate.flush()
        front = (len(packed) + _FRONT_BYTES).to_bytes(2, "big") + _checksum(packed)
        return TOKEN_PREFIX + _to_text(front + packed)

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """The token in a pasted text; blanks, line breaks and quotes around it do not matter.

        Raises TokenInvalid, which says whether the text is cut off or mistyped. Expiry is not checked here.
        """
        seen = (c for c in text if not c.isspace() and unicodedata.category(c) != "Cf")  # Cf: nobody sees it
        body = _body(_packed("".join(seen).strip(_QUOTES)))
        try:
            key = ec.derive_private_key(int.from_bytes(body.key, "big"), ec.SECP256R1())
        except ValueError as error:
            raise TokenInvalid("the token's key is not a P-256 key; ask the owner for another one") from error
        return cls.of(body.root, body.certificate, key, body.sealing_key, body.bootstrap)


def read_token(argument: str, stdin: TextIO | None = None) -> tuple[JoinToken, str | None]:
    """The token of `shoal join TOKEN|@FILE|-`, and a warning if other users can read the file.

    Raises UsageError if there is nothing to read, TokenInvalid if it is no token.
    """
    if argument == "-":
        try:
            return JoinToken.parse((stdin or sys.stdin).read(limits.TOKEN_CHARACTERS + 1)), None
        except UnicodeDecodeError as error:
            raise TokenInvalid("standard input holds no text, so no token") from error
    if not argument.startswith("@"):
        try:
            return JoinToken.parse(argument), None
        except TokenInvalid as error:
            if not os.path.isfile(argument):
                raise
            raise TokenInvalid(
                f"this is a file's name, and no token\nto read it from there: @{argument}"
            ) from error
    path = Path(argument[1:]).expanduser()
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text, mode = file.read(limits.TOKEN_CHARACTERS + 1), path.stat().st_mode
    except OSError as error:
        raise UsageError(f"cannot read the token in {path}: {error.strerror or error}") from error
    warning = None
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        warning = f"other users of this machine can read the token in {path}; run: chmod 600 {path}"
    return JoinToken.parse(text), warning


def _packed(text: str) -> bytes:
    """The deflated body, its length and checksum found right."""
    if not text.startswith(TOKEN_PREFIX):
        raise TokenInvalid(_other_beginning(text))
    letters = text[len(TOKEN_PREFIX) :]
    if odd := re.search(r"[^A-Za-z0-9_-]", letters):
        raise TokenInvalid(
            f"a token has no {odd[0]!r}, this one has after {len(TOKEN_PREFIX) + odd.start()} characters: "
            f"something was copied along, or a chat has changed it (a file it leaves alone: @FILE){_AGAIN}"
        )
    says = int.from_bytes(base64.urlsafe_b64decode(letters[:3] + "A")[:2], "big") if len(letters) > 2 else 0
    likely = says >= _LEAST_BYTES and _characters(says) <= limits.TOKEN_CHARACTERS
    expected = _characters(says if likely else _LEAST_BYTES)
    if len(text) < expected:
        least = "" if likely else "at least "
        raise TokenInvalid(
            f"the token is cut off: {len(text)} characters, {least}{expected} expected{_AGAIN}"
        )
    if not likely:
        raise TokenInvalid(f"the token is mistyped at its beginning: no token is as long as it says{_AGAIN}")
    if len(text) > expected:
        raise TokenInvalid(f"the token is too long: {len(text)} characters, {expected} expected{_AGAIN}")
    data = base64.urlsafe_b64decode(letters + "=" * (-len(letters) % 4))
    if data[2:_FRONT_BYTES] != _checksum(data[_FRONT_BYTES:]) or _to_text(data) != letters:
        raise TokenInvalid(f"the token is mistyped: its checksum does not fit{_AGAIN}")
    return data[_FRONT_BYTES:]


def _other_beginning(text: str) -> str:
    """What to say of a text that does not begin as tokens do."""
    if not text:
        return f"there is no token: the text is empty{_AGAIN}"
    if TOKEN_PREFIX in text:
        before = text.index(TOKEN_PREFIX)
        return f"{before} characters stand before the token\ncopy it alone, from {TOKEN_PREFIX} on"
    if other := re.match(r"shoal[0-9]{1,4}-", text):
        return (
            f"this is a token of another version of Shoal: {other[0]} instead of {TOKEN_PREFIX}\n"
            "ask the owner which version the run has, and install that"
        )
    return f"a token starts with {TOKEN_PREFIX}, this text of {len(text)} characters does not{_AGAIN}"


def _body(packed: bytes) -> TokenBody:
    inflate = zlib.decompressobj(wbits=-15, zdict=_DICTIONARY)
    try:
        data = inflate.decompress(packed, _BODY_BYTES)
        if not inflate.eof or inflate.unused_data:
            raise TokenInvalid("the token holds more than a token can; ask the owner for another one")
        return decode(TokenBody, data)
    except (zlib.error, ProtocolViolation) as error:
        raise TokenInvalid(f"the token cannot be read: {error}; ask the owner for another one") from error


def _characters(size_bytes: int) -> int:
    """Of the text of a token with so many bytes, front included."""
    return len(TOKEN_PREFIX) + (size_bytes * 4 + 2) // 3


def _checksum(packed: bytes) -> bytes:
    return blake3(packed).digest()[:_CHECKSUM_BYTES]


def _to_text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
