"""Puts a Snapshot together from frozen views: the swarm, this peer's own part, and what others told. Pure.

`observer` calls it, in every daemon. Nothing here keeps anything.
"""

from __future__ import annotations

import heapq
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from shoal.dht.liveness import Liveness
from shoal.dht.view import Member, SwarmView, is_measured
from shoal.node.view.figures import Told
from shoal.node.view.names import readable
from shoal.node.view.parts import (
    Compression,
    Coordinator,
    Finding,
    Link,
    Lost,
    Peer,
    Run,
    Stage,
    Throughput,
    Trust,
)
from shoal.node.view.snapshot import LINKS, Own, Snapshot
from shoal.node.view.tally import Tally, number
from shoal.node.view.texts import printable
from shoal.node.view.verdict import if_leaves, verdict
from shoal.protocol.identity import PeerId
from shoal.training.partition import stage_ranges
from shoal.training.spec import RunSpec

REFUSED = 64  # peers of which the snapshot says that others refused what they sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What an observer has gathered besides the view of the moment."""

    standing: str = "running"  # as the owner has ordered: running, paused or stopped
    told: Mapping[PeerId, Told] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    findings: tuple[Finding, ...] = ()
    recent: float | None = None  # tokens a second, while the run moved in the last minutes
    hour: float | None = None
    best: float | None = None
    coordinator: Coordinator = field(default_factory=Coordinator)


def assemble(
    at: float, own: Own, view: SwarmView, spec: RunSpec | None, seen: Seen | None = None
) -> Snapshot:
    """The snapshot at Unix time `at`."""
    seen = seen or Seen()
    tally, stages = seen.tally, stage_rows(view, spec)
    names = names_of(view)
    trains = spec is None or spec.trains
    said = verdict([stage.replicas for stage in stages], seen.standing, trains=trains)
    redone_share = _redone_share(seen)
    links, left_out = _links(view, seen)
    return Snapshot(
        at=at,
        me=own,
        verdict=replace(said, findings=seen.findings),
        run=_run(own, view, spec, stages, seen),
        loss=tally.loss(),
        markers=tally.markers(),
        throughput=Throughput(
            now=stages[0].tokens_per_s if stages else 0.0,
            hour=seen.hour,
            best=seen.best,
            lost=_lost(seen, redone_share),
        ),
        stages=stages,
        peers=peer_rows(view, stages, seen),
        rounds=tally.rounds([stage.height for stage in stages], names),
        links=links,
        links_left_out=left_out,
        compression=tuple(_compression(stage, tally) for stage in range(len(stages))),
        churn=tally.churn(at, redone_share),
        checkpoints=tally.checkpoints(at),
        trust=_trust(own, seen),
        coordinator=seen.coordinator,
        totals=tally.totals(),
        events=tuple(tally.events),
    )


def names_of(view: SwarmView) -> dict[str, str]:
    """What to call the members; those without a name get one that follows from their id."""
    return {member.peer: member.name or readable(member.peer) for member in view.members}


def stage_replicas(view: SwarmView, stage_count: int) -> tuple[int, ...]:
    """Live online replicas of every stage."""
    return tuple(len(view.online(stage)) for stage in range(stage_count))


def stage_rows(view: SwarmView, spec: RunSpec | None) -> tuple[Stage, ...]:
    """The pipeline map's columns; none before the spec is known."""
    if spec is None:
        return ()
    micro_batch = spec.inner.micro_batch_sequences * spec.model.sequence
    steps = spec.outer.inner_steps
    rows = [_stage(view, at, layers, micro_batch, steps) for at, layers in enumerate(stage_ranges(spec))]
    could = [row.could_tokens_per_s for row in rows]
    known = [rate for rate in could if rate is not None]
    weakest = _weakest(rows)
    return tuple(
        replace(
            row,
            balance=rate / max(known) if rate is not None else None,
            weakest=row.stage == weakest and len(rows) > 1,
        )
        for row, rate in zip(rows, could, strict=True)
    )


def _stage(view: SwarmView, stage: int, layers: range, micro_batch_tokens: int, inner_steps: int) -> Stage:
    online = view.online(stage)
    beats = [beat for member in view.group(stage) if (beat := member.progress(stage)) is not None]
    height = max((beat.height for beat in beats), default=0)
    there = {(beat.head, beat.state_root) for beat in beats if beat.height == height}
    count = sum(beat.height == height for beat in beats)
    made = [beat.steps_since_round for beat in beats if beat.height == height]
    rates = [micro_batch_tokens / m.service_s for m in online if is_measured(m.service_s)]
    return Stage(
        stage=stage,
        layers=(layers.start, layers.stop - 1),
        replicas=len(online),
        joining=len(view.group(stage, "joining")),
        guardians=sum(
            any(copy.stage == stage for copy in member.beat.guards) for member in view.here() if member.beat
        ),
        height=height,
        heads_equal=len(there) == 1 if count > 1 else None,
        round_share=min(1.0, statistics.fmean(made) / inner_steps) if made else None,
        tokens_per_s=sum(member.tokens_per_s for member in online),
        could_tokens_per_s=sum(rates) if rates else None,
    )


def _weakest(rows: Sequence[Stage]) -> int:
    """What stops first comes before what is slow: fewest replicas, then the lowest rate."""

    def order(row: Stage) -> tuple[int, float]:
        return min(row.replicas, 2), row.could_tokens_per_s or float("inf")

    return min(rows, key=order).stage if rows else -1


def peer_rows(view: SwarmView, stages: Sequence[Stage], seen: Seen) -> tuple[Peer, ...]:
    """Everybody who is not gone, this peer first, then by stage."""
    members = sorted(view.here(), key=lambda member: (member.peer != view.me, member.stages, member.peer))
    replicas, copies = [row.replicas for row in stages], [row.guardians for row in stages]
    rows = []
    for member in members:
        row = _peer(member, view, replicas, copies)
        told = seen.told.get(member.peer)
        kinds = tuple(finding.kind for finding in seen.findings if finding.peer == member.peer)
        rows.append(replace(_with_told(row, told, view.now_s), findings=kinds) if told else row)
    return tuple(rows)


def _with_told(row: Peer, told: Told, now_s: float) -> Peer:
    figures = told.figures
    if figures is None:
        return row
    row = replace(
        row,
        told_s=round(max(0.0, now_s - told.told_s), 3),
        uptime_s=figures.uptime_s,
        version=printable(figures.version, 64),
        memory_bytes=figures.memory_bytes,
        reachable=printable(figures.reachable),
        trouble=printable(figures.trouble),
        bytes_out=figures.bytes_out,
        bytes_in=figures.bytes_in,
        up_bytes_per_s=told.up_bytes_per_s,
        down_bytes_per_s=told.down_bytes_per_s,
        busy_share=told.busy_share,
    )
    training = figures.training
    if training is None:
        return row
    return replace(
        row,
        tokens=training.tokens,
        micro_batches=training.micro_batches,
        rejected=training.rejected,
        redone=training.redone,
        inner_steps=training.inner_steps,
        loss=training.loss if training.loss >= 0.0 else None,
        sessions=training.sessions,
    )


def _peer(member: Member, view: SwarmView, replicas: Sequence[int], copies: Sequence[int]) -> Peer:
    name = member.name or readable(member.peer)
    progress = member.progress(member.stages[0]) if member.stages else None
    online = bool(member.stages) and member.state == "online" and member.liveness is Liveness.ALIVE
    leaves = ""
    if online and member.stages[0] < len(replicas):
        leaves = if_leaves(name, member.stages[0], replicas, copies)
    return Peer(
        peer=member.peer,
        name=name,
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
        roles=tuple(sorted(role.value for role in member.roles)),
        token_id=member.token_id,
        device=member.device,
        heard_s=None if member.heard_s is None else round(max(0.0, view.now_s - member.heard_s), 3),
        service_s=member.service_s if is_measured(member.service_s) else None,
        uplink_bytes_per_s=progress.uplink_bytes_per_s or None if progress else None,
        inner_steps=progress.inner_steps if progress else None,
        guards=tuple(beat.stage for beat in member.beat.guards) if member.beat else (),
        if_leaves=leaves,
    )


def _run(own: Own, view: SwarmView, spec: RunSpec | None, stages: Sequence[Stage], seen: Seen) -> Run:
    if spec is None:
        return Run(name=own.run_name, run_id=own.run_id)
    beats = [beat for member in view.here() if (beat := member.progress(0)) is not None]
    tokens, goal = max((beat.log_tokens for beat in beats), default=0), spec.inner.total_tokens
    rate = seen.recent or stages[0].tokens_per_s
    known = (told.figures.training for told in seen.told.values() if told.figures and told.figures.training)
    rates = [training.learning_rate for training in known if training.learning_rate >= 0.0]
    steps = own.training.get("round_inner_steps")  # the owner may have ordered another number
    return Run(
        name=own.run_name,
        run_id=own.run_id,
        stages=spec.stages.count,
        model_layers=spec.model.layers,
        tokens=tokens,
        goal_tokens=goal,
        eta_s=max(0, goal - tokens) / rate if rate > 0 else None,
        learning_rate=statistics.median(rates) if rates else None,
        inner_steps=steps if isinstance(steps, int) else spec.outer.inner_steps,
        height=min((row.height for row in stages), default=0),
    )


def _lost(seen: Seen, redone_share: float | None) -> tuple[Lost, ...]:
    """Where time goes, as far as replicas tell."""
    shares = [share for told in seen.told.values() if (share := told.busy_share) is not None]
    found = []
    if shares:
        waiting = 1.0 - statistics.fmean(shares)
        text = f"lanes of {len(shares)} peers waited {waiting:.0%} of the time"
        found.append(Lost(what="waiting", share=waiting, text=text))
    if redone_share is not None:
        text = f"{redone_share:.1%} of the micro-batches were tried again or twice"
        found.append(Lost(what="redone", share=redone_share, text=text))
    return tuple(found)


def _redone_share(seen: Seen) -> float | None:
    training = [
        told.figures.training for told in seen.told.values() if told.figures and told.figures.training
    ]
    redone, done = sum(one.redone for one in training), sum(one.micro_batches for one in training)
    return redone / (redone + done) if redone + done else None


def _links(view: SwarmView, seen: Seen) -> tuple[tuple[Link, ...], int]:
    """Between members who are here, and how many do not fit: those with a measured bandwidth first, then the
    longest."""
    here = {member.peer for member in view.here()}
    found = [
        (link.bytes_per_s <= 0.0, -link.rtt_s, source, link)
        for source, told in seen.told.items()
        if source in here and told.figures is not None
        for link in told.figures.links
        if link.peer in here
    ]
    kept = heapq.nsmallest(LINKS, found, key=lambda one: one[:3])
    links = tuple(
        Link(
            source=source,
            target=link.peer,
            rtt_ms=round(link.rtt_s * 1e3, 3) if link.rtt_s >= 0.0 else None,
            bytes_per_s=link.bytes_per_s or None,
            failures=link.failures,
        )
        for _, _, source, link in kept
    )
    return links, len(found) - len(links)


def _compression(stage: int, tally: Tally) -> Compression:
    row = tally.compression.get(stage)
    if row is None:
        return Compression(stage=stage)
    fields = row.fields
    bits = number(fields, "bits_per_value")
    contribution, _, published = str(fields.get("codecs", "")).partition(", ")
    return Compression(
        stage=stage,
        contribution=contribution,
        published=published,
        bits_per_value=bits,
        ratio=32.0 / bits if bits else None,
        residual_norm=number(fields, "residual_norm"),
        update_norm=number(fields, "update_norm"),
        round_bytes=tally.bytes_of(stage, int(number(fields, "height") or 0)),
    )


def _trust(own: Own, seen: Seen) -> Trust:
    refused: Counter[str] = Counter()
    repaired = 0
    for told in seen.told.values():
        for one in told.figures.refused if told.figures else ():
            refused[printable(one.peer, 64)] += one.count
        repaired += told.figures.training.repaired_parts if told.figures and told.figures.training else 0
    return Trust(
        revocation_version=own.revocation_version,
        refusals=dict(own.refusals),
        refused=dict(refused.most_common(REFUSED)),
        repaired_parts=repaired,
    )
