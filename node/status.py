"""What a peer knows, in one frozen type: what `shoal status`, its JSON, the demo and the dashboard all show.

The daemon builds it, `to_json` gives it stable keys, and nothing else invents figures of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.dht.view import Member, SwarmView
from shoal.node.loop import LoopHealth


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """One peer of the swarm as this one sees it."""

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

    @classmethod
    def of(cls, member: Member) -> PeerStatus:
        progress = member.progress(member.stages[0]) if member.stages else None
        return cls(
            peer=member.peer,
            name=member.name,
            state=member.state,
            liveness=member.liveness.value,
            reason=member.reason,
            stages=member.stages,
            tokens_per_s=member.tokens_per_s,
            backlog_s=member.backlog_s,
            rtt_ms=None if member.rtt_s is None else round(member.rtt_s * 1e3, 3),
            height=progress.height if progress else None,
            head=progress.head.hex() if progress else None,
            state_root=progress.state_root.hex() if progress else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One peer, its run and its swarm. Times are Unix seconds; `training` is the trainer's own report."""

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
    stage_replicas: tuple[int, ...]
    trouble: str  # why this peer cannot go to work, and what to do; empty: nothing is wrong
    peers: tuple[PeerStatus, ...]
    loop: LoopHealth
    training: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """Plain values with stable keys."""
        return dataclasses.asdict(self)


def stage_replicas(view: SwarmView, stage_count: int) -> tuple[int, ...]:
    """Live online replicas of every stage."""
    return tuple(len(view.online(stage)) for stage in range(stage_count))


def swarm_table(view: SwarmView) -> tuple[PeerStatus, ...]:
    """Everybody who is not gone, this peer first, then by stage."""
    members = sorted(view.here(), key=lambda member: (member.peer != view.me, member.stages, member.peer))
    return tuple(PeerStatus.of(member) for member in members)


def verdict(replicas: tuple[int, ...]) -> str:
    """One sentence on what would stop the run first."""
    if not replicas:
        return "Waiting for the spec."
    weakest = min(range(len(replicas)), key=replicas.__getitem__)
    match replicas[weakest]:
        case 0:
            return f"Waiting: stage {weakest} has no replica."
        case 1:
            return f"Training. Stage {weakest} has one replica: one loss away from stopping."
        case count:
            return f"Training. Every stage has {count} replicas or more."
