"""The parts of a Snapshot: frozen rows of plain values, one class for each thing that is shown.

Nothing here computes; `assemble` fills them in. None says that nothing was measured yet; a figure is never
guessed. Times are Unix seconds, texts that peers wrote have been stripped to what prints and cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that diagnosis or liveness holds against a peer, a link or a stage."""

    kind: str  # hung | slow-link | slow-compute | limits-run | lost-stage | lone-replica | storage
    text: str
    peer: str = ""
    name: str = ""
    stage: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How the run is, in one sentence, and why."""

    state: str = "starting"  # starting | waiting | training | serving | paused | stopped
    level: str = "warn"  # ok | warn | bad
    text: str = "Waiting for the spec."
    findings: tuple[Finding, ...] = ()  # the worst first


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is trained, and how far it is."""

    name: str = ""
    run_id: str = ""  # hex
    stages: int = 0
    model_layers: int = 0
    tokens: int = 0  # in the log of the first stage
    goal_tokens: int | None = None
    eta_s: float | None = None  # at the rate of the last hour, or of now
    learning_rate: float | None = None
    inner_steps: int | None = None  # H: of one round
    height: int = 0  # rounds of the stage that is least far


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPoint:
    """Losses in nats a token, against tokens."""

    tokens: int
    at: float
    train: float | None = None
    held_out: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Marker:
    """A fault or a decision to draw into charts over tokens or time."""

    at: float
    tokens: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A way in which time or work goes; of all lane time, or of all micro-batches."""

    what: str  # waiting | redone
    share: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Tokens a second that the first stage committed."""

    now: float = 0.0
    hour: float | None = None
    best: float | None = None
    lost: tuple[Lost, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One column of the pipeline map."""

    stage: int
    layers: tuple[int, int] | None = None  # first and last
    replicas: int = 0  # online and alive
    joining: int = 0
    guardians: int = 0  # peers of other stages that keep a copy
    height: int = 0
    heads_equal: bool | None = None  # P1 at that height; None: fewer than two tell
    round_share: float | None = None  # how much of the next round's inner steps are made
    tokens_per_s: float = 0.0  # what its replicas do
    could_tokens_per_s: float | None = None  # what they could, by their lane times
    balance: float | None = None  # could_tokens_per_s over that of the strongest stage
    weakest: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One of the stages of a peer that has several."""

    stage: int
    state: str  # of the peer there
    height: int | None  # of its log, as its last beat said
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One row of the peers table; first what this peer sees itself, then what that one told."""

    peer: str
    name: str
    state: str
    liveness: str
    reason: str
    stages: tuple[int, ...]
    tokens_per_s: float
    backlog_s: float
    rtt_ms: float | None
    height: int | None  # of its log, as its last beat said
    head: str | None  # hex
    state_root: str | None  # hex
    roles: tuple[str, ...] = ()
    token_id: str = ""
    device: str = ""
    version: str = ""
    heard_s: float | None = None  # ago
    service_s: float | None = None  # lane time of a micro-batch
    uplink_bytes_per_s: float | None = None
    told_s: float | None = None  # how old the figures below are; None: it pushes none to this peer
    uptime_s: float | None = None
    memory_bytes: int | None = None
    reachable: str = ""  # in words
    tokens: int | None = None  # committed by this process, at all stages that it has had
    micro_batches: int | None = None  # accepted
    rejected: int | None = None  # duplicates refused, dropped or lost
    redone: int | None = None  # retries, hedges and restarts
    inner_steps: int | None = None
    loss: float | None = None
    busy_share: float | None = None  # of its lane, of late
    up_bytes_per_s: float | None = None  # of late
    down_bytes_per_s: float | None = None
    bytes_out: int | None = None
    bytes_in: int | None = None
    guards: tuple[int, ...] = ()
    sessions: int | None = None  # of inference
    trouble: str = ""
    findings: tuple[str, ...] = ()  # kinds
    if_leaves: str = ""  # what would become of the run
    held: tuple[Held, ...] = ()  # stage by stage, where it has several: what is above is of the first

    @property
    def heights(self) -> tuple[int, ...]:
        """Of the logs of all its stages, as far as they are known."""
        known = [held.height for held in self.held] or [self.height]
        return tuple(height for height in known if height is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A piece of a round at one member. `start_s` counts from the beginning of the row's earliest phase."""

    name: str  # prepare | wait | send | reduce | collect | decide | apply
    start_s: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundMember:
    """What one member told of a round."""

    peer: str
    name: str
    bytes_out: int
    phases: tuple[Phase, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One row of the waterfall."""

    stage: int
    height: int
    at: float  # when the first member told of it
    seconds: float  # of the slowest member
    tokens: int
    contributors: int
    skipped: int  # parts
    bytes_out: int  # of all who told
    codecs: tuple[str, ...] = ()
    leader: str = ""
    members: tuple[RoundMember, ...] = ()
    slowest: Mapping[str, str] = field(default_factory=dict)  # phase -> peer


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One cell of the matrix: what `source` measured of its way to `target`."""

    source: str
    target: str
    rtt_ms: float | None = None
    bytes_per_s: float | None = None
    failures: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What rounds of one stage send."""

    stage: int
    contribution: str = ""  # codec
    published: str = ""
    bits_per_value: float | None = None  # of a contribution
    ratio: float | None = None  # of 32 bits over those
    round_bytes: int | None = None  # of all members, in the last round
    residual_norm: float | None = None  # largest among the members
    update_norm: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Churn:
    """Coming and going, as far as this peer saw it in the last hour."""

    joins: int = 0
    leaves: int = 0
    median_session_s: float | None = None
    reroutes: int = 0
    reroute_p50_s: float | None = None
    reroute_p95_s: float | None = None
    redone_share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """The last whole checkpoint, and what stands against the next."""

    at: float | None = None
    age_s: float | None = None
    path: str = ""
    bytes: int | None = None
    heights: tuple[int, ...] = ()
    stages: Mapping[str, int] = field(
        default_factory=dict
    )  # stage -> newest height that a replica has on disk
    refused: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Who was refused, and what for."""

    revocation_version: int = 0
    refusals: Mapping[str, int] = field(
        default_factory=dict
    )  # kind -> inbound streams that were refused here
    refused: Mapping[str, int] = field(default_factory=dict)  # peer -> data that others refused from it
    repaired_parts: int = 0
    audits: Mapping[str, int] = field(
        default_factory=dict
    )  # result -> texts that a second chain recomputed, for anybody here


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Seconds, counted since the process started: how many took at most each bound, and how many in all."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()  # cumulative, the last is of all
    sum: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Of this peer's own events since its process started; for `/metrics`."""

    reroutes: Histogram = field(default_factory=Histogram)
    phases: Mapping[str, Histogram] = field(default_factory=dict)  # of rounds
    events: Mapping[str, int] = field(default_factory=dict)  # by kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinator:
    """How this peer's own view fares."""

    pushing: int = 0  # peers whose telemetry comes here
    events_taken: int = 0
    events_refused: int = 0  # over a peer's budget, or more than the history holds
    events_dropped: int = 0  # by peers whose buffer was full
    history: str = "off"  # in words: kept, or why not
    history_bytes: int | None = None
    history_queue: int = 0
    cpu_share: float | None = None  # of one core, this process, of late
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRow:
    """Something that happened, in words and fields."""

    number: int  # grows; of this process
    at: float
    kind: str
    peer: str
    name: str
    text: str
    fields: Mapping[str, str | float] = field(default_factory=dict)
