"""The frozen picture of the swarm that every policy reads: who is here, what they do, who is alive.

`Members.view()` makes it. Times are loop times of the observer, so a view is worth something only at home.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.dht.beats import Beat, StageBeat
from shoal.dht.liveness import Liveness
from shoal.protocol.identity import PeerId, Role

NEARLY_ALL = 0.8
LEAST_SERVICE_S = 1e-6  # no lane does a micro-batch in less; a rate made of such a claim may be infinite


def is_measured(service_s: float) -> bool:
    """Whether a claimed lane time of a micro-batch, in a beat or a record, says anything; else: unknown."""
    return service_s >= LEAST_SERVICE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One peer as this one sees it. Claims are the member's own; liveness, rtt and heard are ours."""

    peer: PeerId
    roles: frozenset[Role] = frozenset({Role.TRAINER})
    token_id: str = ""
    state: str = "online"  # one of directory.PEER_STATES
    stages: tuple[int, ...] = ()  # held, or being joined
    states: tuple[str, ...] = ()  # at each of them, where they differ
    name: str = ""
    device: str = ""
    incarnation: int = 0
    tokens_per_s: float = 0.0  # its claim: the last beat's, else its record's; 0: unknown
    service_s: float = 0.0  # lane time of a micro-batch at its stage, likewise
    liveness: Liveness = Liveness.ALIVE
    reason: str = ""  # of the liveness
    departed: bool = False  # gone because it said goodbye or its process is not there any more
    gone_s: float | None = None  # since when it is gone
    heard_s: float | None = None  # its last beat; None: known by its record only
    rtt_s: float | None = None  # smoothed round trip over the beats
    beat: Beat | None = None

    @property
    def backlog_s(self) -> float:
        return self.beat.backlog_s if self.beat else 0.0

    def state_at(self, stage: int) -> str:
        """One of directory.PEER_STATES."""
        if len(self.states) != len(self.stages) or stage not in self.stages:
            return self.state
        return self.states[self.stages.index(stage)]

    def incarnation_at(self, stage: int) -> int:
        """Of its replica of a stage, which may be younger than the peer."""
        progress = self.progress(stage)
        return (progress.incarnation if progress is not None else 0) or self.incarnation

    def tokens_per_s_at(self, stage: int) -> float:
        """What it does at a stage: of several that it holds, each has drivers and replicas of its own."""
        progress = self.progress(stage) if len(self.stages) > 1 else None
        return progress.tokens_per_s if progress is not None else self.tokens_per_s

    def progress(self, stage: int) -> StageBeat | None:
        """What its last beat said of a stage."""
        if self.beat is not None:
            for beat in self.beat.stages:
                if beat.stage == stage:
                    return beat
        return None


@dataclass(frozen=True, slots=True)
class SwarmView:
    """All known members, this peer among them, sorted by peer id; gone ones stay for a while."""

    me: PeerId
    now_s: float
    members: tuple[Member, ...]
    sizes: Mapping[int, float] = field(default_factory=dict)  # about, of stages; empty: everybody is known
    sampled: bool = False  # records are kept of a part of the swarm only
    absent_since_s: Mapping[int, float] = field(default_factory=dict)  # stages of which nobody meets a copy

    def get(self, peer: PeerId) -> Member | None:
        index = bisect_left(self.members, peer, key=lambda member: member.peer)
        found = self.members[index] if index < len(self.members) else None
        return found if found is not None and found.peer == peer else None

    def is_gone(self, peer: PeerId) -> bool:
        """Whether this peer is gone: who is unknown, too, if everybody is known."""
        member = self.get(peer)
        return not self.sizes if member is None else member.liveness is Liveness.GONE

    def share(self, stage: int) -> float:
        """How many replicas of a stage each known one stands for."""
        known = sum(stage in member.stages for member in self.here()) if self.sizes else 0
        return max(1.0, self.sizes.get(stage, 0.0) / known) if known else 1.0

    def part(self) -> float:
        """The share of the swarm that is known here; nearly all counts as all, since sizes are about so."""
        share = len(self.here()) / max(sum(self.sizes.values()), 1.0)
        return share if self.sampled and share < NEARLY_ALL else 1.0

    def here(self) -> tuple[Member, ...]:
        """Everybody who is not gone."""
        return tuple([member for member in self.members if member.liveness is not Liveness.GONE])

    def group(self, stage: int, *states: str) -> tuple[Member, ...]:
        """Who is not gone and holds (or joins) a stage in one of `states`; by default all states."""
        return tuple(
            [
                m
                for m in self.members
                if stage in m.stages
                and m.liveness is not Liveness.GONE
                and (not states or m.state_at(stage) in states)
            ]
        )

    def online(self, stage: int) -> tuple[Member, ...]:
        """Replicas of a stage that take work now: online and alive."""
        return tuple([m for m in self.group(stage, "online") if m.liveness is Liveness.ALIVE])
