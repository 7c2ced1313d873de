"""What peers tell the owner's peers, method "telemetry", control channel. `push` sends, `intake` takes.

The caller says which process it is and hears which of its events are held already; then it sends batches, one
answer each. Nothing in them says who speaks: that is the authenticated peer of the stream. Numbers below 0
stand for "not measured". All of it is a claim: it is shown, and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from shoal.dht.beats import BytesPerS, TokensPerS
from shoal.dht.directory import StageIndex, UnixSeconds
from shoal.protocol.wire import Bounds, Count, Finite, Identifier, Items, Length, Seconds, Text, wire_message

METHOD = "telemetry"
EVENTS_IN_BATCH = 32
FIELDS = 48
KIND_CHARACTERS, FIELD_CHARACTERS, VALUE_CHARACTERS = 32, 40, 160
LINKS, REFUSALS = 64, 16
Measured = Annotated[float, Bounds(-1.0, 1e18)]
Loss = Annotated[float, Bounds(-1.0, 1e6)]
PeerText = Annotated[str, Length(1, 64)]


@wire_message
@dataclass(frozen=True, slots=True)
class TelemetryField:
    """One value of an event: a number if `numeric`, else a text."""

    name: Annotated[str, Length(1, FIELD_CHARACTERS)]
    text: Annotated[str, Length(0, VALUE_CHARACTERS)] = ""
    number: Finite = 0.0
    numeric: bool = False


@wire_message
@dataclass(frozen=True, slots=True)
class TelemetryEvent:
    """Something that happened; `number` counts from 1 in each process."""

    number: Count
    at_unix_s: UnixSeconds
    kind: Annotated[str, Length(1, KIND_CHARACTERS)]
    fields: Annotated[tuple[TelemetryField, ...], Items(FIELDS)] = ()


@wire_message
@dataclass(frozen=True, slots=True)
class TelemetryLink:
    """What the sender measured of its way to a peer."""

    peer: PeerText
    rtt_s: Measured = -1.0
    bytes_per_s: BytesPerS = 0.0
    failures: Count = 0


@wire_message
@dataclass(frozen=True, slots=True)
class TelemetryRefusals:
    """How much of what a peer sent was refused."""

    peer: PeerText
    count: Count


@wire_message
@dataclass(frozen=True, slots=True)
class TelemetryTraining:
    """Of a peer's replicas together. Counters start with the process."""

    stage: StageIndex
    tokens: Count = 0
    micro_batches: Count = 0
    rejected: Count = 0
    redone: Count = 0
    inner_steps: Count = 0
    rounds: Count = 0
    rounds_failed: Count = 0
    repaired_parts: Count = 0
    lane_busy_s: Seconds = 0.0
    lane_finished: Count = 0
    tokens_per_s: TokensPerS = 0.0
    loss: Loss = -1.0
    learning_rate: Measured = -1.0
    checkpoint_height: Count = 0
    sessions: Count = 0


@wire_message
@dataclass(frozen=True, slots=True)
class TelemetryAudits:
    """Texts that the sender had written and then recomputed by a second chain."""

    agreed: Count = 0
    disagreed: Count = 0
    unchecked: Count = 0


@wire_message
@dataclass(frozen=True, slots=True)
class TelemetryFigures:
    """A peer's own figures now."""

    uptime_s: Seconds
    version: Text = ""
    memory_bytes: Count = 0
    reachable: Text = ""
    trouble: Text = ""
    bytes_out: Count = 0
    bytes_in: Count = 0
    training: TelemetryTraining | None = None
    links: Annotated[tuple[TelemetryLink, ...], Items(LINKS)] = ()
    refused: Annotated[tuple[TelemetryRefusals, ...], Items(REFUSALS)] = ()
    audits: TelemetryAudits | None = None


@wire_message
@dataclass(frozen=True, slots=True)
class TelemetryHello:
    """Opens the stream. A process that starts later has a higher number."""

    process: Identifier


@wire_message
@dataclass(frozen=True, slots=True)
class TelemetryTaken:
    """The events of this process up to `number` need not be sent again."""

    number: Count


@wire_message
@dataclass(frozen=True, slots=True)
class TelemetryBatch:
    """Events in their order, and the newest figures. `dropped`: events that fell out of a full buffer."""

    events: Annotated[tuple[TelemetryEvent, ...], Items(EVENTS_IN_BATCH)] = ()
    figures: TelemetryFigures | None = None
    dropped: Count = 0
