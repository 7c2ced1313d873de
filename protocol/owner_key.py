"""The run owner's root key: makes and extends tokens, revokes, and signs what only the owner may decide.

One directory: `owner.key` (secret; back it up, nothing replaces it), `tokens.jsonl` (tokens issued, never
their keys), `revocations` and `amendments`. Used by `shoal up`, `shoal token` and the owner's orders, off the
event loop: it writes to disk.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from shoal.protocol import limits
from shoal.protocol.amendments import (
    Amendments,
    load_amendments,
    sign_amendments,
)
from shoal.protocol.certificate_form import TOKEN_ID_BYTES, TokenGrant
from shoal.protocol.certificates import (
    extend_token_certificate,
    make_root,
    make_token_certificate,
    verify_token,
)
from shoal.protocol.errors import MessageInvalid, RecordInvalid, StorageError, UsageError
from shoal.protocol.identity import PeerId, Role, labelled
from shoal.protocol.join_token import JoinToken
from shoal.protocol.private_files import append_private, create_private, read_private, write_private
from shoal.protocol.revocation import (
    RevocationList,
    SignedRevocations,
    file_bytes,
    load_revocations,
    sign_revocations,
    verify_revocations,
)
from shoal.protocol.wire import Digest, Length, decode, encode, wire_message

_KEY_FILE, _REGISTER_FILE = "owner.key", "tokens.jsonl"
_REVOCATIONS_FILE, _AMENDMENTS_FILE = "revocations", "amendments"
_KEY_FILE_BYTES = 4 * limits.KIB
_REGISTER_BYTES = 16 * limits.MIB  # 1.2 KB a token
_Secret = Annotated[bytes, Length(32, 32)]


@wire_message
@dataclass(frozen=True, slots=True)
class OwnerSecrets:
    """The content of `owner.key`."""

    run_id: Digest
    run_name: Annotated[str, Length(0, limits.NAME_CHARACTERS)]
    root: Annotated[bytes, Length(1, limits.CERTIFICATE_BYTES)]
    key: _Secret = field(repr=False)  # the P-256 scalar, big-endian
    sealing_key: _Secret = field(repr=False)


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A line of the register, for `shoal token list`."""

    token_id: str  # hex
    name: str
    roles: frozenset[Role]
    not_after: float  # Unix time
    certificate_der: bytes = field(repr=False)


class OwnerKey:
    """See the module. `root_der`, `run_id`, `run_name` and `sealing_key` are what was created once."""

    def __init__(self, directory: Path, held: OwnerSecrets) -> None:
        """Of `load` and `create`. Raises StorageError if the key is not the root's."""
        self.directory = directory
        self.run_id, self.run_name = held.run_id, held.run_name
        self.root_der, self.sealing_key = held.root, held.sealing_key
        try:
            self._key = ec.derive_private_key(int.from_bytes(held.key, "big"), ec.SECP256R1())
        except ValueError as error:
            raise StorageError(f"{directory / _KEY_FILE} is damaged; restore it from a backup") from error

    @classmethod
    def create(cls, directory: Path, run_id: bytes, run_name: str, now: float) -> OwnerKey:
        """A new root key for a run. Raises StorageError if the directory holds one already."""
        key = ec.generate_private_key(ec.SECP256R1())
        held = OwnerSecrets(
            run_id=run_id,
            run_name=run_name,
            root=make_root(key, run_id, now),
            key=key.private_numbers().private_value.to_bytes(32, "big"),
            sealing_key=secrets.token_bytes(32),
        )
        if not create_private(directory / _KEY_FILE, encode(held)):
            raise StorageError(
                f"{directory} already holds an owner's key; use it, or choose another directory: without "
                "its key a run can have no new tokens"
            )
        return cls(directory, held)

    @classmethod
    def load(cls, directory: Path) -> OwnerKey:
        """The key in `directory`. Raises StorageError if it is missing, damaged or open to others."""
        path = directory / _KEY_FILE
        data = read_private(path, _KEY_FILE_BYTES)
        if data is None:
            raise StorageError(f"there is no owner's key in {directory}; `shoal up` makes one for a new run")
        try:
            return cls(directory, decode(OwnerSecrets, data))
        except MessageInvalid as error:
            raise StorageError(f"{path} is damaged ({error}); restore it from a backup") from error

    def issue_token(
        self,
        roles: Iterable[Role],
        ttl_s: float,
        bootstrap: Iterable[str],
        name: str,
        now: float,
    ) -> JoinToken:
        """A new token, entered in the register. Raises UsageError or StorageError."""
        roles, bootstrap = frozenset(roles), tuple(bootstrap)
        if not roles or ttl_s < 1:
            raise UsageError("a token needs a role and a life of a second at least")
        if len(bootstrap) > limits.BOOTSTRAP_ADDRESSES or not all(1 <= len(a) <= 256 for a in bootstrap):
            raise UsageError(
                f"a token carries {limits.BOOTSTRAP_ADDRESSES} addresses of 256 characters at most"
            )
        key = ec.generate_private_key(ec.SECP256R1())
        grant = TokenGrant(self.run_id, secrets.token_bytes(TOKEN_ID_BYTES), tuple(sorted(roles)))
        certificate = make_token_certificate(
            self._key, self.root_der, key.public_key(), grant, now, now + ttl_s
        )
        token = JoinToken.of(self.root_der, certificate, key, self.sealing_key, bootstrap)
        self._register(IssuedToken(token.token_id, name, token.roles, token.not_after, certificate))
        return token

    def extend_token(self, token_id: str, ttl_s: float, now: float) -> bytes:
        """The certificate (DER) that lets a token live until now + `ttl_s`.

        Peers pass it on to `Membership.adopt_token_certificate`. Raises UsageError if this owner never
        issued the token, ChainInvalid if the register was tampered with, StorageError.
        """
        issued = next((t for t in self.tokens() if t.token_id == token_id), None)
        if issued is None:
            raise UsageError(f"no token {token_id} was issued here; `shoal token list` shows them")
        verify_token(issued.certificate_der, self.root_der, self.run_id, now=None)  # never sign a foreign key
        certificate = extend_token_certificate(
            self._key, self.root_der, issued.certificate_der, now, now + ttl_s
        )
        not_after = verify_token(certificate, self.root_der, self.run_id, now=None).not_after
        self._register(replace(issued, not_after=not_after, certificate_der=certificate))
        return certificate

    def tokens(self) -> tuple[IssuedToken, ...]:
        """All tokens issued, oldest first, each as last extended. Raises StorageError."""
        data = read_private(self.directory / _REGISTER_FILE, _REGISTER_BYTES) or b""
        known: dict[str, IssuedToken] = {}
        for line in data.splitlines():
            issued = _issued(line)
            if issued:
                known[issued.token_id] = issued
        return tuple(known.values())

    @property
    def revocations_path(self) -> Path:
        """The newest list this owner signed; the owner's own daemon keeps its RevocationBook here."""
        return self.directory / _REVOCATIONS_FILE

    def revoke(self, token_ids: Iterable[str] = (), peers: Iterable[PeerId] = ()) -> SignedRevocations:
        """The next revocation list with these added, on disk when this returns; peers have to `adopt` it.

        Raises UsageError for what is no id, MessageTooLarge for too many, StorageError.
        """
        return self._sign_revocations(self.revocations().extended(token_ids, peers))

    def pardon(self, peer: PeerId) -> SignedRevocations:
        """The next list without this peer, as `revoke` makes it."""
        return self._sign_revocations(self.revocations().pardoned(peer))

    def revocations(self) -> RevocationList:
        """As last signed. Raises StorageError."""
        stored = load_revocations(self.revocations_path, self.run_id, self.root_der)
        return stored[1] if stored else RevocationList()

    def _sign_revocations(self, listed: RevocationList) -> SignedRevocations:
        signed = sign_revocations(listed, self.run_id, self.sign)
        try:
            verify_revocations(signed, self.run_id, self.root_der)
        except RecordInvalid as error:
            raise UsageError(f"only token ids and peer ids can be revoked: {error}") from error
        write_private(self.revocations_path, file_bytes(signed))
        return signed

    @property
    def amendments_path(self) -> Path:
        """Likewise of the orders, for the daemon's AmendmentBook."""
        return self.directory / _AMENDMENTS_FILE

    def amendments(self) -> Amendments:
        """As last signed. Raises StorageError."""
        stored = load_amendments(self.amendments_path, self.run_id, self.root_der)
        return stored[1] if stored else Amendments(self.run_id)

    def amend(self, change: Callable[[Amendments], Amendments]) -> Amendments:
        """The list that `change` makes of the newest one, signed and on disk if it is another.

        `change` gets the version to come in `version`. Peers have to `adopt` it. Raises StorageError, and
        ValueError for a list that may not be.
        """
        before = self.amendments()
        coming = replace(before, version=before.version + 1)
        after = change(coming)
        if after == coming:
            return before
        write_private(self.amendments_path, encode(sign_amendments(after, self.sign)))
        return after

    def sign(self, label: bytes, data: bytes) -> bytes:
        """A DER signature (ECDSA, SHA-256) that `verify_owner_signature` accepts for this label and data."""
        return self._key.sign(labelled(label, data), ec.ECDSA(hashes.SHA256()))

    def __repr__(self) -> str:
        return f"OwnerKey(run {self.run_id.hex()[:16]}, {self.directory})"

    def _register(self, issued: IssuedToken) -> None:
        line = {
            "id": issued.token_id,
            "name": issued.name,
            "roles": sorted(issued.roles),
            "not_after": issued.not_after,
            "certificate": issued.certificate_der.hex(),
        }
        append_private(self.directory / _REGISTER_FILE, json.dumps(line))


def _issued(line: bytes) -> IssuedToken | None:
    """A line of the register; None for one that a crash tore, whose token nobody ever got."""
    try:
        entry = json.loads(line)
        return IssuedToken(
            token_id=str(entry["id"]),
            name=str(entry["name"]),
            roles=frozenset(Role(role) for role in entry["roles"]),
            not_after=float(entry["not_after"]),
            certificate_der=bytes.fromhex(entry["certificate"]),
        )
    except (ValueError, KeyError, TypeError):
        return None
