"""Who is shut out: one list of token ids and peer ids, signed by the owner, cumulative and versioned.

Its version rides on heartbeats; whoever knows a lower one fetches the list (notice as header, entries
as payload) and adopts it. A newer list contains all of an older one, or says which peers it lets back and
since which version, so nobody comes back by an owner's mistake; tokens never do. The daemon gives it to
joiners first; the transport closes streams when it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from blake3 import blake3

from shoal.protocol import limits
from shoal.protocol.certificate_form import TOKEN_ID_BYTES
from shoal.protocol.certificates import verify_owner_signature
from shoal.protocol.errors import MessageTooLarge, ProtocolViolation, RecordInvalid, StorageError
from shoal.protocol.identity import PeerId, VerifiedPeer, public_key_of
from shoal.protocol.private_files import read_private, write_private
from shoal.protocol.signed_book import SignedBook, Write
from shoal.protocol.wire import Count, Digest, Length, decode, encode, wire_message

LABEL = b"revocation list"
ENTRIES_BYTES = limits.REVOCATIONS * 56  # a peer id has 52 characters; mark and line end add 2
_FILE_BYTES = ENTRIES_BYTES + limits.HEADER_BYTES


@wire_message
@dataclass(frozen=True, slots=True)
class RevocationNotice:
    """What the owner signs: run, version and digest of the entries. The entries are the payload."""

    run_id: Digest
    version: Count
    entries_digest: Digest  # BLAKE3
    signature: Annotated[bytes, Length(0, 80)]  # ECDSA, DER, over the three above

    def signed_bytes(self) -> bytes:
        return self.run_id + self.version.to_bytes(8, "big") + self.entries_digest


@dataclass(frozen=True, slots=True)
class SignedRevocations:
    """A list as it travels and lies on disk."""

    notice: RevocationNotice
    entries: bytes  # at most ENTRIES_BYTES


@dataclass(frozen=True, slots=True)
class RevocationList:
    """The ids shut out, at a version. Version 0 is the empty list that nobody signed."""

    version: int = 0
    token_ids: frozenset[str] = frozenset()  # hex
    peers: frozenset[PeerId] = frozenset()
    pardons: frozenset[tuple[PeerId, int]] = frozenset()  # peers let back, and the version that did it

    def __contains__(self, verified: VerifiedPeer) -> bool:
        return verified.token_id in self.token_ids or verified.peer in self.peers

    def covers(self, older: RevocationList) -> bool:
        """Whether everything in `older` is in this list, but for those pardoned since."""
        since = {peer for peer, version in self.pardons if version > older.version}
        return self.token_ids >= older.token_ids and self.peers | since >= older.peers

    def extended(self, token_ids: Iterable[str], peers: Iterable[PeerId]) -> RevocationList:
        """The next version, with these added."""
        peers = frozenset(peers)
        pardons = frozenset(pardon for pardon in self.pardons if pardon[0] not in peers)
        return RevocationList(self.version + 1, self.token_ids.union(token_ids), self.peers | peers, pardons)

    def pardoned(self, peer: PeerId) -> RevocationList:
        """The next version, without this peer."""
        version = self.version + 1
        pardons = {pardon for pardon in self.pardons if pardon[0] != peer} | {(peer, version)}
        return RevocationList(version, self.token_ids, self.peers - {peer}, frozenset(pardons))

    def entries(self) -> bytes:
        """One line an id, sorted: "a" and a peer id with a version, "p" and a peer id, "t" and a token id.

        Raises MessageTooLarge; a pardon takes the place of two.
        """
        if len(self.token_ids) + len(self.peers) + 2 * len(self.pardons) > limits.REVOCATIONS:
            raise MessageTooLarge(f"a revocation list holds {limits.REVOCATIONS} ids at most")
        lines = [f"a{peer} {version}\n" for peer, version in sorted(self.pardons)]
        lines += [f"p{peer}\n" for peer in sorted(self.peers)]
        lines += [f"t{token_id}\n" for token_id in sorted(self.token_ids)]
        return "".join(lines).encode()


def sign_revocations(
    listed: RevocationList, run_id: bytes, sign: Callable[[bytes, bytes], bytes]
) -> SignedRevocations:
    """The list under the owner's signature; `sign` is `OwnerKey.sign`."""
    entries = listed.entries()
    digest = blake3(entries).digest()
    bare = RevocationNotice(run_id, listed.version, digest, b"")
    notice = RevocationNotice(run_id, listed.version, digest, sign(LABEL, bare.signed_bytes()))
    return SignedRevocations(notice, entries)


def verify_revocations(signed: SignedRevocations, run_id: bytes, root_der: bytes) -> RevocationList:
    """The list, after its run, size, signature and form held. Raises RecordInvalid or MessageTooLarge."""
    notice, entries = signed.notice, signed.entries
    if len(entries) > ENTRIES_BYTES:
        raise MessageTooLarge(f"a revocation list of {len(entries)} bytes, {ENTRIES_BYTES} allowed")
    if notice.run_id != run_id or notice.entries_digest != blake3(entries).digest():
        raise RecordInvalid("a revocation list that is of another run, or damaged")
    verify_owner_signature(root_der, LABEL, notice.signed_bytes(), notice.signature)
    return _parsed(notice.version, entries)


class RevocationBook(SignedBook[SignedRevocations, RevocationList]):
    """The newest list this peer knows."""

    def __init__(
        self, run_id: bytes, root_der: bytes, path: Path | None = None, write: Write = write_private
    ) -> None:
        """See `SignedBook`. Raises StorageError."""
        self._run_id, self._root_der = run_id, root_der
        super().__init__(RevocationList(), path, write)

    def is_revoked(self, verified: VerifiedPeer) -> bool:
        """Whether this peer or its token is shut out."""
        return verified in self.current

    def _newer(self, signed: SignedRevocations) -> RevocationList | None:
        if signed.notice.version <= self.version:
            return None
        listed = verify_revocations(signed, self._run_id, self._root_der)
        if not listed.covers(self.current):
            raise RecordInvalid(
                f"revocation list {listed.version} lacks entries of list {self.version}; the owner must "
                "add to the newest list, not to an old copy"
            )
        return listed

    def _load(self, path: Path) -> tuple[SignedRevocations, RevocationList] | None:
        return load_revocations(path, self._run_id, self._root_der)

    def _file(self, signed: SignedRevocations) -> bytes:
        return file_bytes(signed)


def load_revocations(
    path: Path, run_id: bytes, root_der: bytes
) -> tuple[SignedRevocations, RevocationList] | None:
    """The list on disk, verified again; None if there is none. Raises StorageError."""
    data = read_private(path, _FILE_BYTES)
    if data is None:
        return None
    length = int.from_bytes(data[:4], "big")
    try:
        signed = SignedRevocations(decode(RevocationNotice, data[4 : 4 + length]), data[4 + length :])
        return signed, verify_revocations(signed, run_id, root_der)
    except ProtocolViolation as error:
        raise StorageError(
            f"the revocation list in {path} is damaged or of another run ({error}); restore it, or delete "
            "it: other peers give it again"
        ) from error


def file_bytes(signed: SignedRevocations) -> bytes:
    """What `load_revocations` reads: length of the notice (4 bytes), notice, entries."""
    notice = encode(signed.notice)
    return len(notice).to_bytes(4, "big") + notice + signed.entries


def _parsed(version: int, entries: bytes) -> RevocationList:
    token_ids, peers, pardons = set[str](), set[PeerId](), set[tuple[PeerId, int]]()
    try:
        for line in entries.decode("ascii").splitlines():
            if line.startswith("t") and _is_token_id(line[1:]):
                token_ids.add(line[1:])
            elif line.startswith("p"):
                public_key_of(PeerId(line[1:]))
                peers.add(PeerId(line[1:]))
            elif line.startswith("a"):
                peer, _, since = line[1:].partition(" ")
                public_key_of(PeerId(peer))
                pardons.add((PeerId(peer), _version(since, version)))
            else:
                raise RecordInvalid(f"a revocation list with the entry {line[:64]!r}")
    except ValueError as error:
        raise RecordInvalid(f"a revocation list that is not text of ids: {error}") from error
    if not peers.isdisjoint(peer for peer, _ in pardons):
        raise RecordInvalid("a revocation list that shuts a peer out and lets it back")
    return RevocationList(version, frozenset(token_ids), frozenset(peers), frozenset(pardons))


def _version(text: str, newest: int) -> int:
    if not text.isdecimal() or len(text) > 16 or not 1 <= int(text) <= newest:
        raise RecordInvalid(f"a revocation list {newest} with a pardon of list {text[:16]!r}")
    return int(text)


def _is_token_id(text: str) -> bool:
    return len(text) == 2 * TOKEN_ID_BYTES and bytes.fromhex(text).hex() == text
