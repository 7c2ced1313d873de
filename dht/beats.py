"""What two neighbours say to each other on their heartbeat stream, method "beat", control channel.

Each side first sends its own record (`RosterRecords`), then a `Beat` every second and at every change, in
which it offers records it learned. In between, either may ask for those it lacks, hand over a newer
revocation list or newer amendments (`protocol.revocation`, `protocol.amendments`), and say goodbye. `link`
speaks it; all readers of a `SwarmView` read the beats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from shoal.dht.directory import STAGES_HELD, PeerIdText, SignedRecord, StageIndex
from shoal.protocol.wire import Bounds, Count, Digest, Identifier, Items, Seconds, Text, wire_message

METHOD = "beat"
NO_DIGEST = bytes(32)  # of a log or a state that does not exist yet
STREAMS_CLAIMED = 8
RECORDS_IN_MESSAGE = 8  # of up to 4 KiB: half a header
NAMES_IN_MESSAGE = 64
ABSENCES = 16
TokensPerS = Annotated[float, Bounds(0.0, 1e12)]
BytesPerS = Annotated[float, Bounds(0.0, 1e12)]


@wire_message
@dataclass(frozen=True, slots=True)
class StageBeat:
    """How far a replica is with one stage. Counters start with the process."""

    stage: StageIndex
    height: Count = 0  # of its log
    head: Digest = NO_DIGEST  # of its log at that height
    state_root: Digest = NO_DIGEST  # hash of anchors and outer momentum at the head (promise P1)
    log_tokens: Count = 0  # of all replicas, in the log up to the head
    inner_steps: Count = 0
    tokens: Count = 0  # committed
    steps_since_round: Count = 0
    tokens_since_round: Count = 0
    uplink_bytes_per_s: BytesPerS = 0.0  # about what its uplink carries in bulk; 0: unknown
    service_s: Seconds = 0.0  # lane time of one micro-batch, forward to weight gradient; 0: unknown
    fixed: bool = False  # it stays at this stage, wherever it would help more
    step_s: Seconds = 0.0  # a step of a text takes of late, its wait included; 0: unknown
    incarnation: Identifier = 0  # of the replica, where its peer began it later than itself; 0: the peer's
    tokens_per_s: TokensPerS = 0.0  # committed at this stage of late: those of one peer may differ
    reentering: Count = 0  # entries of a chain that lost, which it has still to bring back


@wire_message
@dataclass(frozen=True, slots=True)
class Absence:
    """A stage of which the sender has met no copy for so long."""

    stage: StageIndex
    for_s: Seconds


@wire_message
@dataclass(frozen=True, slots=True)
class RosterEntry:
    """The version of a peer's record that the sender holds."""

    peer: PeerIdText
    incarnation: Identifier
    sequence: Count


@wire_message
@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat. The first six fields are filled in by `Members`, the others by the trainer."""

    incarnation: Identifier = 0  # as in the sender's record
    number: Count = 0  # on this stream, from 1
    heard_number: Count = 0  # the receiver's last beat that the sender has seen, 0: none; for the round trip
    held_s: Seconds = 0.0  # how long ago that was
    record_sequence: Count = 0  # of the sender's newest record
    revocation_version: Count = 0  # of the list the sender holds
    backlog_s: Seconds = 0.0  # compute queued on its lane
    tokens_per_s: TokensPerS = 0.0  # committed of late; what it could do says `StageBeat.service_s`
    finished_work: Count = 0  # items its lane finished; stands still while the lane does
    draining: bool = False
    stages: Annotated[tuple[StageBeat, ...], Items(STAGES_HELD)] = ()
    guards: Annotated[tuple[StageBeat, ...], Items(8)] = ()  # copies of other stages that it keeps
    spare_bytes: Count = 0  # memory that it gives for such copies, those it has included
    streams: Annotated[tuple[Identifier, ...], Items(STREAMS_CLAIMED)] = ()  # of data, that it claims
    amendment_version: Count = 0  # of the owner's orders that the sender holds; filled in by `Members`
    room: Count = 0  # for more stages beside those it holds, should nobody else have them
    offers: Annotated[tuple[RosterEntry, ...], Items(NAMES_IN_MESSAGE)] = ()  # learned; ask for what you want
    absences: Annotated[tuple[Absence, ...], Items(ABSENCES)] = ()  # filled in by `Members`

    @property
    def service_s(self) -> float:
        """At the stage it holds; 0: unknown."""
        return self.stages[0].service_s if self.stages else 0.0


def together(beats: Sequence[Beat]) -> Beat:
    """What a peer says that has several replicas on one lane. They tell the same work of each micro-batch."""
    if len(beats) == 1:
        return beats[0]
    most = max(beats, key=lambda beat: beat.spare_bytes, default=Beat())
    return Beat(
        backlog_s=max((beat.backlog_s for beat in beats), default=0.0),
        tokens_per_s=max((beat.tokens_per_s for beat in beats), default=0.0),
        finished_work=max((beat.finished_work for beat in beats), default=0),
        stages=tuple(stage for beat in beats for stage in beat.stages)[:STAGES_HELD],
        guards=most.guards,
        spare_bytes=most.spare_bytes,
        streams=tuple(stream for beat in beats for stream in beat.streams)[:STREAMS_CLAIMED],
    )


@wire_message
@dataclass(frozen=True, slots=True)
class RosterRecords:
    """Records, the sender's own first where it is among them."""

    records: Annotated[tuple[SignedRecord, ...], Items(RECORDS_IN_MESSAGE)]


@wire_message
@dataclass(frozen=True, slots=True)
class RosterWant:
    """Records the sender would like to have."""

    peers: Annotated[tuple[PeerIdText, ...], Items(NAMES_IN_MESSAGE)]


@wire_message
@dataclass(frozen=True, slots=True)
class Goodbye:
    """The sender leaves for good; nothing more will come from this incarnation."""

    incarnation: Identifier
    reason: Text
