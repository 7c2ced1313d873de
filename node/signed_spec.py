"""The run's spec under its owner's signature, as it lies on disk and as peers hand it to joiners.

A joiner knows the run id and the root certificate from its token. It takes the spec from any peer: the hash
must be the run id and the signature the owner's, so it does not matter who answers.
Method `spec`, one request, one reply; the owner's newest lists (revocations, amendments) ride in the same
answer, so that a joiner has them before it talks to anybody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from shoal.protocol import limits
from shoal.protocol.admission import Membership, OwnerKey, verify_owner_signature
from shoal.protocol.amendments import SignedAmendments
from shoal.protocol.errors import AccessError, NotHere, PeerSilent, ShoalError, SpecError, StorageError
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.private_files import read_private, write_private
from shoal.protocol.revocation import ENTRIES_BYTES, RevocationNotice, SignedRevocations
from shoal.protocol.transport import Stream, Transport
from shoal.protocol.wire import Length, wire_message
from shoal.training import spec_file
from shoal.training.outer.ask_around import first_good
from shoal.training.spec import RunSpec

METHOD = "spec"
LABEL = b"run spec"
ROLES = frozenset(Role)
_ASK_S = 5.0  # one peer
_SPEC_FILE, _SIGNATURE_FILE = "spec.json", "spec.signature"
_SIGNATURE_BYTES = 80  # ECDSA over P-256, DER


@wire_message
@dataclass(frozen=True, slots=True)
class SpecRequest:
    """Asks for the run's spec and revocations."""


@wire_message
@dataclass(frozen=True, slots=True)
class SpecReply:
    """The payload is the canonical spec. Then, where there are any, a RevocationNotice with its entries, and
    SignedAmendments."""

    signature: Annotated[bytes, Length(8, _SIGNATURE_BYTES)]
    revocations: bool
    amendments: bool = False


@dataclass(frozen=True, slots=True)
class SignedSpec:
    """A spec whose hash names the run, and the owner's signature over its canonical bytes."""

    spec: RunSpec
    signature: bytes

    @classmethod
    def sign(cls, spec: RunSpec, key: OwnerKey) -> SignedSpec:
        return cls(spec, key.sign(LABEL, spec.canonical()))

    @classmethod
    def verified(cls, canonical: bytes, signature: bytes, run_id: bytes, root_der: bytes) -> SignedSpec:
        """Raises SpecError or RecordInvalid for anything that is not this run's spec, signed by its owner."""
        spec = spec_file.from_canonical(canonical)
        if spec.run_id() != run_id:
            raise SpecError(
                f"the spec received is of run {spec.run_id().hex()[:16]}, not {run_id.hex()[:16]}"
            )
        verify_owner_signature(root_der, LABEL, canonical, signature)
        return cls(spec, signature)

    def save(self, folder: Path) -> None:
        write_private(folder / _SIGNATURE_FILE, self.signature)
        write_private(folder / _SPEC_FILE, self.spec.canonical())

    @classmethod
    def load(cls, folder: Path) -> SignedSpec | None:
        """What `save` wrote, None if nothing. Raises StorageError if damaged."""
        canonical = read_private(folder / _SPEC_FILE, limits.SPEC_BYTES)
        signature = read_private(folder / _SIGNATURE_FILE, _SIGNATURE_BYTES)
        if canonical is None or signature is None:
            return None
        try:
            return cls(spec_file.from_canonical(canonical), signature)
        except SpecError as error:
            raise StorageError(
                f"{folder / _SPEC_FILE} is damaged: {error}\ndelete it and join again"
            ) from error


def serve_spec(transport: Transport, known: Callable[[], SignedSpec | None], membership: Membership) -> None:
    """Answer joiners; before the transport starts. A peer that has just come may not know it itself."""

    async def answer(stream: Stream) -> None:
        await stream.receive(SpecRequest)
        signed = known()
        if signed is None:
            raise NotHere("this peer has just joined and does not know the spec yet; ask another one")
        revocations, amendments = membership.revocations.signed, membership.amendments.signed
        reply = SpecReply(signed.signature, revocations is not None, amendments is not None)
        await stream.send(reply, signed.spec.canonical())
        if revocations is not None:
            await stream.send(revocations.notice, revocations.entries)
        if amendments is not None:
            await stream.send(amendments)

    transport.serve(METHOD, answer, ROLES)


async def fetch_spec(transport: Transport, peer: PeerId, membership: Membership) -> SignedSpec:
    """The spec as `peer` tells it, verified; newer lists are adopted.

    Raises PeerSilent, what `Transport.open` raises, SpecError, RecordInvalid.
    """
    try:
        async with asyncio.timeout(_ASK_S):
            return await _fetch_spec(transport, peer, membership)
    except TimeoutError:
        raise PeerSilent(f"no answer within {_ASK_S:g} s") from None


async def spec_of_any(
    transport: Transport, peers: Sequence[PeerId], membership: Membership
) -> tuple[SignedSpec | None, dict[PeerId, ShoalError]]:
    """The spec from the first of `peers` that gives it, and why others gave none.

    Raises AccessError where one refuses this peer and nobody gives it: one that lies could keep all
    newcomers out.
    """
    found, failures = await first_good(peers, lambda peer: fetch_spec(transport, peer, membership))
    refused = (error for error in failures.values() if isinstance(error, AccessError))
    if found is None and (refusal := next(refused, None)) is not None:
        raise refusal
    return found, failures


async def _fetch_spec(transport: Transport, peer: PeerId, membership: Membership) -> SignedSpec:
    async with transport.open(peer, METHOD) as stream:
        await stream.send(SpecRequest())
        await stream.end()
        reply = await stream.receive(SpecReply, max_payload_bytes=limits.SPEC_BYTES)
        header: SpecReply = reply.header
        if header.revocations:
            listed = await stream.receive(RevocationNotice, max_payload_bytes=ENTRIES_BYTES)
            membership.revocations.adopt(SignedRevocations(listed.header, bytes(listed.payload)))
        if header.amendments:
            membership.amendments.adopt((await stream.receive(SignedAmendments)).header)
    token = membership.token
    return SignedSpec.verified(bytes(reply.payload), header.signature, token.run_id, token.root_der)
