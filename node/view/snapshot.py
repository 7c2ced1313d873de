"""Snapshot: what this peer knows of itself, its run and its swarm, in one frozen type.

`shoal status`, the dashboard, JSON and `/metrics` all show it, and nothing else invents figures of its own.
Every daemon makes one (`assemble`); at a peer with the owner role it has what the others push (`telemetry`),
else what their heartbeats say. `to_json` has stable keys, `from_json` reads it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.node.loop import LoopHealth
from shoal.node.view.parts import (
    Checkpoints,
    Churn,
    Compression,
    Coordinator,
    EventRow,
    Link,
    LossPoint,
    Marker,
    Peer,
    Round,
    Run,
    Stage,
    Throughput,
    Totals,
    Trust,
    Verdict,
)
from shoal.node.view.plain import plain, read

LOSS_POINTS = 400  # most of a snapshot; what is older is thinned out
MARKERS = 100
ROUNDS = 24
LINKS = 1024
EVENTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """The peer that made the snapshot. `training` is its trainer's own report."""

    version: str
    pid: int
    run_name: str
    run_id: str
    peer: str
    name: str
    roles: tuple[str, ...]
    state: str  # one of directory.PEER_STATES
    stage: int | None
    stage_count: int
    layers: tuple[int, int] | None  # first and last layer held
    device: str
    memory_bytes: int
    addresses: tuple[str, ...]
    bootstrap: tuple[str, ...]
    reachable: str  # in words
    uplink_bytes_per_s: float | None  # measured, at most the limit; None: not yet
    upload_limit_bytes_per_s: float | None  # what --upload allows
    uptime_s: float
    token_id: str
    token_until: float
    leaf_until: float
    revocation_version: int
    data_dir: str
    trouble: str  # why this peer cannot go to work, and what to do; empty: nothing is wrong
    loop: LoopHealth
    bytes_out: Mapping[str, int] = field(default_factory=dict)  # by method
    bytes_in: Mapping[str, int] = field(default_factory=dict)
    refusals: Mapping[str, int] = field(default_factory=dict)  # inbound streams, by error
    training: Mapping[str, object] = field(default_factory=dict)
    others: tuple[Mapping[str, object], ...] = ()  # reports of the other stages that it holds
    done: Mapping[str, int] = field(default_factory=dict)  # `counts_of` all replicas that it has or had
    audits: Mapping[str, int] = field(
        default_factory=dict
    )  # of its own questions to the run's model, by result


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """See the module. Unix seconds where nothing else is said."""

    at: float
    me: Own
    verdict: Verdict = field(default_factory=Verdict)
    run: Run = field(default_factory=Run)
    loss: tuple[LossPoint, ...] = ()  # by tokens
    markers: tuple[Marker, ...] = ()
    throughput: Throughput = field(default_factory=Throughput)
    stages: tuple[Stage, ...] = ()
    peers: tuple[Peer, ...] = ()  # who is not gone: the own row first, then by stage
    peers_about: int | None = (
        None  # in the whole swarm, where this peer knows a part: then all counts are of it
    )
    rounds: tuple[Round, ...] = ()  # the newest last
    links: tuple[Link, ...] = ()
    links_left_out: int = 0
    compression: tuple[Compression, ...] = ()
    churn: Churn = field(default_factory=Churn)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    trust: Trust = field(default_factory=Trust)
    coordinator: Coordinator = field(default_factory=Coordinator)
    totals: Totals = field(default_factory=Totals)
    events: tuple[EventRow, ...] = ()  # the newest last

    @property
    def replicas(self) -> tuple[int, ...]:
        """Live online replicas of every stage."""
        return tuple(stage.replicas for stage in self.stages)

    @property
    def online(self) -> int:
        """Live online peers."""
        return sum(peer.state == "online" and peer.liveness == "alive" for peer in self.peers)

    def to_json(self) -> dict[str, object]:
        """Plain values with stable keys."""
        values: dict[str, object] = plain(self)
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Snapshot:
        """What `to_json` wrote; keys that this version does not know are ignored. Raises ValueError."""
        return read(cls, values)

    def brief(self) -> dict[str, object]:
        """What `shoal status --json` prints: the own part's keys on top, then verdict, stages and peers."""
        return {
            **plain(self.me),
            "verdict": self.verdict.text,
            "stage_replicas": self.replicas,
            "peers_about": self.peers_about,
            "findings": plain(self.verdict.findings),
            "tokens_per_s": self.throughput.now,
            "stages": plain(self.stages),
            "peers": plain(self.peers),
        }
