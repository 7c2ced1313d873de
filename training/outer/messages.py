"""What the peers of a group say to each other in a round and about the log.

Leader and member share one control stream a round (method "outer.round"): Prepare → Answer → Go → Report →
Commit → Done, with Gone and Tick in between. Contributions and published parts go straight between members
and owners on bulk streams, named by the hash of the draft that GO carried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from shoal.protocol import limits
from shoal.protocol.wire import Bounds, Count, Digest, Identifier, Items, Length, Seconds, wire_message
from shoal.training.outer.entry import ENTRY_BYTES, Norm, SeatIndex, StreamPosition

PartIndex = Annotated[int, Bounds(0, limits.PARTS - 1)]
PayloadBytes = Annotated[int, Bounds(0, ENTRY_BYTES)]


def method(stage: int, name: str) -> str:
    """The transport method of a stage's group: a peer that changed stage does not answer for the old one."""
    return f"outer.{stage}.{name}"


@wire_message
@dataclass(frozen=True, slots=True)
class Prepare:
    """The leader opens a round, or takes one over. Payload: the draft so far, without contributors."""

    height: Count
    previous: Digest
    ballot: Count


@wire_message
@dataclass(frozen=True, slots=True)
class Answer:
    """What a member has for the round. Payload: an undecided draft and an unapplied entry of this height."""

    height: Count  # of the member's log; the round's or more: it has been committed already
    from_step: Count
    to_step: Count
    tokens: Count
    norm: Norm
    positions: Annotated[tuple[StreamPosition, ...], Items(8)]
    promised: Count = 0  # a higher ballot that the member has promised: it refuses
    draft_bytes: PayloadBytes = 0
    entry_bytes: PayloadBytes = 0
    leaves: bool = False  # asks to be let go to another stage
    incarnation: Identifier = 0  # of this replica, if the leader may not have heard of it; 0: as offered


@wire_message
@dataclass(frozen=True, slots=True)
class Go:
    """Contribute now. Payload: the draft."""

    deadline_s: Seconds


@wire_message
@dataclass(frozen=True, slots=True)
class Gone:
    """A seat does not take part any more: wait neither for its contributions nor for its parts."""

    seat: SeatIndex


@wire_message
@dataclass(frozen=True, slots=True)
class Tick:
    """Still there; sent whenever nothing else was for a while."""


@wire_message
@dataclass(frozen=True, slots=True)
class Report:
    """The parts a member holds. Payload: digest of each part (zeros: none), then bitmap of each part."""

    draft: Digest


@wire_message
@dataclass(frozen=True, slots=True)
class Commit:
    """The round's result. Payload: the entry."""


@wire_message
@dataclass(frozen=True, slots=True)
class Done:
    """The member has applied the entry."""

    height: Count
    head: Digest


@wire_message
@dataclass(frozen=True, slots=True)
class Contributing:
    """Opens a member's stream of ContributedParts to one owner."""

    draft: Digest


@wire_message
@dataclass(frozen=True, slots=True)
class Publishing:
    """Opens an owner's stream of PublishedParts to one member; its END says that no more will come."""

    draft: Digest


@wire_message
@dataclass(frozen=True, slots=True)
class ContributedPart:
    """Payload: the sender's encoded delta in that part."""

    part: PartIndex


@wire_message
@dataclass(frozen=True, slots=True)
class PublishedPart:
    """Payload: the encoded mean of a part."""

    part: PartIndex
    listed: Annotated[bytes, Length(1, limits.ROSTER // 8)]


@wire_message
@dataclass(frozen=True, slots=True)
class PartRequest:
    """Asks any holder for a published part by its digest."""

    part: PartIndex
    digest: Digest


@wire_message
@dataclass(frozen=True, slots=True)
class EntriesRequest:
    """Asks for the entries of some heights, in order; their parts are fetched by digest."""

    from_height: Count
    to_height: Count


@wire_message
@dataclass(frozen=True, slots=True)
class EntryItem:
    """Payload: one entry."""

    height: Count


@wire_message
@dataclass(frozen=True, slots=True)
class ManifestRequest:
    """Asks for the newest snapshot's manifest, or that of one height."""

    height: Count = 0  # 0: the newest


@wire_message
@dataclass(frozen=True, slots=True)
class OrdersRequest:
    """Asks for the owner's newest list that is known there; answered with SignedAmendments."""


@wire_message
@dataclass(frozen=True, slots=True)
class Keep:
    """A lone replica hands its guardian an entry before it commits it. Payload: the entry."""


@wire_message
@dataclass(frozen=True, slots=True)
class Kept:
    """The guardian has that entry, with all its parts."""

    height: Count
    head: Digest


@wire_message
@dataclass(frozen=True, slots=True)
class StateRequest:
    """Asks for parts (by their index in the stage) of the state at a head; none: for all parts' digests."""

    head: Digest
    state_root: Digest
    parts: Annotated[tuple[Annotated[int, Bounds(0, 2**32)], ...], Items(1024)] = ()


@wire_message
@dataclass(frozen=True, slots=True)
class StateDigests:
    """Payload: the digest of each part's anchor and momentum."""


@wire_message
@dataclass(frozen=True, slots=True)
class StatePart:
    """Payload: a part's anchor, then its momentum, fp32 little-endian."""

    part: Annotated[int, Bounds(0, 2**32)]


@wire_message
@dataclass(frozen=True, slots=True)
class Manifest:
    """A snapshot: anchors, then momentum, fp32 little-endian. Payload: chunk hashes, then the LogState."""

    height: Count
    head: Digest
    state_root: Digest
    chunk_bytes: Annotated[int, Bounds(1, 4 * limits.MIB)]
    size_bytes: Count
    state_bytes: Count


@wire_message
@dataclass(frozen=True, slots=True)
class ChunkRequest:
    """Asks for some chunks of a snapshot, answered in the order asked."""

    height: Count
    state_root: Digest
    chunks: Annotated[tuple[Annotated[int, Bounds(0, 2**32)], ...], Items(1024)]


@wire_message
@dataclass(frozen=True, slots=True)
class Chunk:
    """Payload: the chunk's bytes."""

    index: Annotated[int, Bounds(0, 2**32)]
