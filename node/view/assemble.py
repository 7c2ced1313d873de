"""Puts a Snapshot together from frozen views: the swarm, this peer's own part, and what others told. Pure.

`observer` calls it, in every daemon. Nothing here keeps anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shoal.dht.view import Member, SwarmView, is_measured
from shoal.node.view.parts import Peer, Run, Stage, Throughput, Verdict
from shoal.node.view.snapshot import Own, Snapshot
from shoal.node.view.verdict import if_leaves, verdict
from shoal.training.partition import stage_ranges
from shoal.training.spec import RunSpec


def assemble(at: float, own: Own, view: SwarmView, spec: RunSpec | None) -> Snapshot:
    """The snapshot at Unix time `at`."""
    stages = stage_rows(view, spec)
    replicas = [stage.replicas for stage in stages]
    state, text = verdict(replicas)
    return Snapshot(
        at=at,
        me=own,
        verdict=Verdict(state=state, text=text),
        run=_run(own, view, spec, stages),
        throughput=Throughput(now=stages[0].tokens_per_s if stages else 0.0),
        stages=stages,
        peers=peer_rows(view, stages),
    )


def stage_replicas(view: SwarmView, stage_count: int) -> tuple[int, ...]:
    """Live online replicas of every stage."""
    return tuple(len(view.online(stage)) for stage in range(stage_count))


def stage_rows(view: SwarmView, spec: RunSpec | None) -> tuple[Stage, ...]:
    """The pipeline map's columns; none before the spec is known."""
    if spec is None:
        return ()
    micro_batch = spec.inner.micro_batch_sequences * spec.model.sequence
    rows = [_stage(view, stage, layers, micro_batch) for stage, layers in enumerate(stage_ranges(spec))]
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


def _stage(view: SwarmView, stage: int, layers: range, micro_batch_tokens: int) -> Stage:
    online = view.online(stage)
    beats = [beat for member in view.group(stage) if (beat := member.progress(stage)) is not None]
    height = max((beat.height for beat in beats), default=0)
    there = {(beat.head, beat.state_root) for beat in beats if beat.height == height}
    count = sum(beat.height == height for beat in beats)
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
        tokens_per_s=sum(member.tokens_per_s for member in online),
        could_tokens_per_s=sum(rates) if rates else None,
    )


def _weakest(rows: Sequence[Stage]) -> int:
    """What stops first comes before what is slow: fewest replicas, then the lowest rate."""

    def order(row: Stage) -> tuple[int, float]:
        return min(row.replicas, 2), row.could_tokens_per_s or float("inf")

    return min(rows, key=order).stage if rows else -1


def peer_rows(view: SwarmView, stages: Sequence[Stage]) -> tuple[Peer, ...]:
    """Everybody who is not gone, this peer first, then by stage."""
    members = sorted(view.here(), key=lambda member: (member.peer != view.me, member.stages, member.peer))
    return tuple(_peer(member, view, stages) for member in members)


def _peer(member: Member, view: SwarmView, stages: Sequence[Stage]) -> Peer:
    progress = member.progress(member.stages[0]) if member.stages else None
    online = bool(member.stages) and member in view.online(member.stages[0])
    leaves = ""
    if online and member.stages[0] < len(stages):
        replicas, copies = [row.replicas for row in stages], [row.guardians for row in stages]
        leaves = if_leaves(member.name, member.stages[0], replicas, copies)
    return Peer(
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
        roles=tuple(sorted(member.roles)),
        token_id=member.token_id,
        device=member.device,
        heard_s=None if member.heard_s is None else round(max(0.0, view.now_s - member.heard_s), 3),
        service_s=member.service_s if is_measured(member.service_s) else None,
        uplink_bytes_per_s=progress.uplink_bytes_per_s or None if progress else None,
        inner_steps=progress.inner_steps if progress else None,
        guards=tuple(beat.stage for beat in member.beat.guards) if member.beat else (),
        if_leaves=leaves,
    )


def _run(own: Own, view: SwarmView, spec: RunSpec | None, stages: Sequence[Stage]) -> Run:
    if spec is None:
        return Run(name=own.run_name, run_id=own.run_id)
    beats = [beat for member in view.here() if (beat := member.progress(0)) is not None]
    tokens, goal = max((beat.log_tokens for beat in beats), default=0), spec.inner.total_tokens
    rate = stages[0].tokens_per_s
    return Run(
        name=own.run_name,
        run_id=own.run_id,
        stages=spec.stages.count,
        model_layers=spec.model.layers,
        tokens=tokens,
        goal_tokens=goal,
        eta_s=max(0, goal - tokens) / rate if rate > 0 else None,
        inner_steps=spec.outer.inner_steps,
        height=min((row.height for row in stages), default=0),
    )
