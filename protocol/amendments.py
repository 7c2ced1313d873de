"""What the run's owner decides after the start: one list, signed by the owner, cumulative and versioned.

Whether the run goes on, settings that differ from the spec's (each with the revision that brought it), and
errands for single peers. It travels like `revocation`: its version rides on heartbeats, whoever knows a lower
one is sent the list, joiners get it first, and it lies on disk. A newer list replaces an older one whole.
What the settings mean knows `training.amended`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from shoal.protocol import limits
from shoal.protocol.certificates import verify_owner_signature
from shoal.protocol.errors import ProtocolViolation, RecordInvalid, StorageError
from shoal.protocol.private_files import read_private, write_private
from shoal.protocol.signed_book import SignedBook, Write
from shoal.protocol.wire import (
    Bounds,
    Count,
    Digest,
    Finite,
    Identifier,
    Items,
    Length,
    OneOf,
    Text,
    decode,
    encode,
    wire_message,
)

LABEL = b"amendments"
RUNNING, PAUSED, STOPPED = "running", "paused", "stopped"
DRAIN, KICK = "drain", "kick"
ErrandKind = Literal["drain", "kick"]
_Version = Annotated[int, Bounds(1, 2**53)]
_FILE_BYTES = limits.AMENDMENTS_BYTES + limits.KIB


@wire_message
@dataclass(frozen=True, slots=True)
class Setting:
    """A key of the spec and its value from a revision on."""

    revision: _Version  # the list's version that brought it
    key: Annotated[str, Length(1, 64)]
    value: Finite  # whole numbers up to 2**53 included


@wire_message
@dataclass(frozen=True, slots=True)
class Errand:
    """One process of one peer shall go. drain: finish and contribute first; kick: at once."""

    version: _Version
    kind: Annotated[str, OneOf(frozenset({DRAIN, KICK}))]
    peer: Annotated[str, Length(1, 64)]
    incarnation: Identifier  # the newest known when it was ordered: a process begun later is not meant
    reason: Text = ""


@wire_message
@dataclass(frozen=True, slots=True)
class Amendments:
    """All that is ordered at a version. Version 0 is the empty list that nobody signed."""

    run_id: Digest
    version: Count = 0
    state: Annotated[str, OneOf(frozenset({RUNNING, PAUSED, STOPPED}))] = RUNNING
    settings: Annotated[tuple[Setting, ...], Items(limits.AMENDED_SETTINGS)] = ()  # by revision
    errands: Annotated[tuple[Errand, ...], Items(limits.ERRANDS)] = ()  # by version

    def __post_init__(self) -> None:
        for versions in (
            [setting.revision for setting in self.settings],
            [errand.version for errand in self.errands],
        ):
            if versions != sorted(versions) or (versions and versions[-1] > self.version):
                raise ValueError("an entry is out of order or newer than the list")

    @property
    def revision(self) -> int:
        """Of the newest settings; 0 while the spec stands as it was signed."""
        return self.settings[-1].revision if self.settings else 0


@wire_message
@dataclass(frozen=True, slots=True)
class SignedAmendments:
    """A list as it travels and lies on disk. `body`: Amendments."""

    body: Annotated[bytes, Length(1, limits.AMENDMENTS_BYTES)]
    signature: Annotated[bytes, Length(0, 80)]  # ECDSA, DER, by the owner


def sign_amendments(listed: Amendments, sign: Callable[[bytes, bytes], bytes]) -> SignedAmendments:
    """The list under the owner's signature; `sign` is `OwnerKey.sign`. Raises MessageTooLarge."""
    body = encode(listed, limits.AMENDMENTS_BYTES)
    return SignedAmendments(body, sign(LABEL, body))


def verify_amendments(signed: SignedAmendments, run_id: bytes, root_der: bytes) -> Amendments:
    """The list, after its form, run and signature held. Raises RecordInvalid or MessageInvalid."""
    listed = decode(Amendments, signed.body, limits.AMENDMENTS_BYTES)
    if listed.run_id != run_id:
        raise RecordInvalid("amendments of another run")
    verify_owner_signature(root_der, LABEL, signed.body, signed.signature)
    return listed


class AmendmentBook(SignedBook[SignedAmendments, Amendments]):
    """The newest list this peer knows."""

    def __init__(
        self, run_id: bytes, root_der: bytes, path: Path | None = None, write: Write = write_private
    ) -> None:
        """See `SignedBook`. Raises StorageError."""
        self._run_id, self._root_der = run_id, root_der
        super().__init__(Amendments(run_id), path, write)

    def _newer(self, signed: SignedAmendments) -> Amendments | None:
        if signed == self.signed:
            return None
        listed = verify_amendments(signed, self._run_id, self._root_der)
        return listed if listed.version > self.version else None

    def _load(self, path: Path) -> tuple[SignedAmendments, Amendments] | None:
        return load_amendments(path, self._run_id, self._root_der)

    def _file(self, signed: SignedAmendments) -> bytes:
        return encode(signed)


def load_amendments(path: Path, run_id: bytes, root_der: bytes) -> tuple[SignedAmendments, Amendments] | None:
    """The list on disk, verified again; None if there is none. Raises StorageError."""
    data = read_private(path, _FILE_BYTES)
    if data is None:
        return None
    try:
        signed = decode(SignedAmendments, data)
        return signed, verify_amendments(signed, run_id, root_der)
    except ProtocolViolation as error:
        raise StorageError(
            f"the amendments in {path} are damaged or of another run ({error}); restore the file, or delete "
            "it: other peers give it again"
        ) from error
