"""The Snapshot's rows of stages and peers, from the view of the moment and what peers told. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from shoal.dht.liveness import Liveness
from shoal.dht.view import Member, SwarmView, is_measured
from shoal.node.view.figures import Told
from shoal.node.view.names import readable
from shoal.node.view.parts import Finding, Held, Peer, Stage
from shoal.node.view.texts import printable
from shoal.node.view.verdict import if_leaves
from shoal.protocol.identity import PeerId
from shoal.training.partition import stage_ranges
from shoal.training.spec import RunSpec


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
    rates = [micro_batch_tokens / (len(m.stages) * m.service_s) for m in online if is_measured(m.service_s)]
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
        tokens_per_s=sum(member.tokens_per_s_at(stage) for member in online),
        could_tokens_per_s=sum(rates) if rates else None,
    )


def _weakest(rows: Sequence[Stage]) -> int:
    """What stops first comes before what is slow: fewest replicas, then the lowest rate."""

    def order(row: Stage) -> tuple[int, float]:
        return min(row.replicas, 2), row.could_tokens_per_s or float("inf")

    return min(rows, key=order).stage if rows else -1


def peer_rows(
    view: SwarmView, stages: Sequence[Stage], told_by: Mapping[PeerId, Told], findings: Sequence[Finding]
) -> tuple[Peer, ...]:
    """Everybody who is not gone, this peer first, then by stage."""
    members = sorted(view.here(), key=lambda member: (member.peer != view.me, member.stages, member.peer))
    replicas, copies = [row.replicas for row in stages], [row.guardians for row in stages]
    rows = []
    for member in members:
        row = _peer(member, view, replicas, copies)
        told = told_by.get(member.peer)
        kinds = tuple(finding.kind for finding in findings if finding.peer == member.peer)
        row = _with_told(row, told, view.now_s) if told else row
        rows.append(replace(row, findings=kinds) if kinds else row)
    return tuple(rows)


def _with_told(row: Peer, told: Told, now_s: float) -> Peer:
    figures = told.figures
    if figures is None:
        return row
    changed: dict[str, Any] = {
        "told_s": round(max(0.0, now_s - told.told_s), 3),
        "uptime_s": figures.uptime_s,
        "version": printable(figures.version, 64),
        "memory_bytes": figures.memory_bytes,
        "reachable": printable(figures.reachable),
        "trouble": printable(figures.trouble),
        "bytes_out": figures.bytes_out,
        "bytes_in": figures.bytes_in,
        "up_bytes_per_s": told.up_bytes_per_s,
        "down_bytes_per_s": told.down_bytes_per_s,
        "busy_share": told.busy_share,
    }
    if (training := figures.training) is not None:
        changed |= {
            "tokens": training.tokens,
            "micro_batches": training.micro_batches,
            "rejected": training.rejected,
            "redone": training.redone,
            "inner_steps": training.inner_steps,
            "loss": training.loss if training.loss >= 0.0 else None,
            "sessions": training.sessions,
        }
    return replace(row, **changed)


def _peer(member: Member, view: SwarmView, replicas: Sequence[int], copies: Sequence[int]) -> Peer:
    name = member.name or readable(member.peer)
    progress = member.progress(member.stages[0]) if member.stages else None
    online = bool(member.stages) and member.state == "online" and member.liveness is Liveness.ALIVE
    leaves = ""
    if online:
        held = [s for s in member.stages if s < len(replicas) and member.state_at(s) == "online"]
        leaves = " ".join(if_leaves(name, stage, replicas, copies) for stage in held)
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
        held=_held(member) if len(member.stages) > 1 else (),
    )


def _held(member: Member) -> tuple[Held, ...]:
    """Each of the stages of a peer that has several."""
    found = []
    for stage in member.stages:
        progress = member.progress(stage)
        height = progress.height if progress else None
        rate = member.tokens_per_s_at(stage) if progress else 0.0
        found.append(Held(stage=stage, state=member.state_at(stage), height=height, tokens_per_s=rate))
    return tuple(found)
