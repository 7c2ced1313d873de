"""Puts a Snapshot together from frozen views: the swarm, this peer's own part, and what others told. Pure.

`observer` calls it, in every daemon. Nothing here keeps anything.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from shoal.dht.view import SwarmView
from shoal.node.view.figures import Told
from shoal.node.view.parts import (
    Coordinator,
    Finding,
    Link,
    Lost,
    Run,
    Stage,
    Throughput,
    Trust,
)
from shoal.node.view.rows import names_of, peer_rows, stage_rows
from shoal.node.view.snapshot import LINKS, Own, Snapshot
from shoal.node.view.tally import Tally
from shoal.node.view.texts import printable
from shoal.node.view.verdict import verdict
from shoal.protocol.identity import PeerId
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
    heights = [stage.height for stage in stages]
    trains = spec is None or spec.trains
    said = verdict([stage.replicas for stage in stages], seen.standing, trains=trains)
    about = round(sum(view.sizes.values())) if view.part() < 1.0 else None
    if about is not None:
        known = f"This peer knows {len(view.here()):,} of about {about:,} peers; all counts are of those."
        said = replace(said, text=f"{said.text} {known}")
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
        peers=peer_rows(view, stages, seen.told, seen.findings),
        peers_about=about,
        rounds=tally.rounds.shown(heights, names_of(view)),
        links=links,
        links_left_out=left_out,
        compression=tally.rounds.compression(heights),
        churn=tally.churn(at, redone_share),
        checkpoints=tally.checkpoints(at),
        trust=_trust(own, seen),
        coordinator=seen.coordinator,
        totals=tally.counts.totals(),
        events=tuple(tally.events),
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
        text = f"lanes of replicas waited {waiting:.0%} of the time ({len(shares)} tell)"
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
    """Between members who are here, the same number of each source where not all fit; how many do not."""
    here = {member.peer for member in view.here()}
    sources = {peer: told.links for peer, told in seen.told.items() if peer in here and told.links}
    each = max(1, LINKS // max(1, len(sources)))
    links = [
        Link(
            source=source,
            target=link.peer,
            rtt_ms=round(link.rtt_s * 1e3, 3) if link.rtt_s >= 0.0 else None,
            bytes_per_s=link.bytes_per_s or None,
            failures=link.failures,
        )
        for source, found in sources.items()
        for link in found[:each]
        if link.peer in here
    ]
    return tuple(links[:LINKS]), sum(map(len, sources.values())) - min(len(links), LINKS)


def _trust(own: Own, seen: Seen) -> Trust:
    refused: Counter[str] = Counter()
    audits = Counter(own.audits)
    repaired = 0
    for peer, told in seen.told.items():
        if told.figures and told.figures.audits and peer != own.peer:
            audits.update(dataclasses.asdict(told.figures.audits))
        for one in told.figures.refused if told.figures else ():
            refused[printable(one.peer, 64)] += one.count
        repaired += told.figures.training.repaired_parts if told.figures and told.figures.training else 0
    return Trust(
        revocation_version=own.revocation_version,
        refusals=dict(own.refusals),
        refused=dict(refused.most_common(REFUSED)),
        repaired_parts=repaired,
        audits=dict(audits),
    )
