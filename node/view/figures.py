"""A peer's own figures as it pushes them, and what a reader of several keeps of them. For `observer`."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.dht.view import SwarmView
from shoal.node.view.messages import (
    LINKS,
    REFUSALS,
    TelemetryAudits,
    TelemetryFigures,
    TelemetryLink,
    TelemetryRefusals,
    TelemetryTraining,
)
from shoal.node.view.snapshot import Own
from shoal.protocol.identity import PeerId

_WINDOW_S = 30.0  # of rates
_MARKS = 64


def figures_of(own: Own, view: SwarmView) -> TelemetryFigures:
    """What `own` says, as a message; figures that are not finite become "not measured"."""
    reports: list[Mapping[str, Any]] = [report for report in (own.training, *own.others) if report]
    refused: Counter[str] = Counter()
    for report in reports:
        refused.update(report.get("outer", {}).get("refused", {}))
    return TelemetryFigures(
        uptime_s=max(0.0, own.uptime_s),
        version=own.version[:256],
        memory_bytes=own.memory_bytes,
        reachable=own.reachable[:256],
        trouble=own.trouble[:256],
        bytes_out=sum(own.bytes_out.values()),
        bytes_in=sum(own.bytes_in.values()),
        training=_training(reports, own.done) if reports else None,
        links=_links(reports, view),
        refused=tuple(TelemetryRefusals(peer, count) for peer, count in sorted(refused.items())[:REFUSALS]),
        audits=audits_of(own.audits),
    )


def audits_of(counts: Mapping[str, int]) -> TelemetryAudits | None:
    """By result, as a message; None where nothing was checked."""
    return TelemetryAudits(**counts) if counts else None


def counts_of(report: Mapping[str, Any]) -> Counter[str]:
    """What a replica has counted since it began, as `TelemetryTraining` calls it.

    A replica that only serves tells less of itself than one that trains.
    """
    outer = report.get("outer", {})

    def count(*names: str) -> int:
        return sum(int(report.get(name, 0)) for name in names)

    return Counter(
        tokens=count("tokens"),
        micro_batches=count("micro_batches"),
        rejected=count("duplicates_refused", "dropped", "lost"),
        redone=count("retries", "hedges", "restarted"),
        inner_steps=count("inner_steps"),
        rounds=outer.get("rounds", 0),
        rounds_failed=outer.get("failed", 0),
        repaired_parts=outer.get("repaired_parts", 0),
    )


def _training(reports: Sequence[Mapping[str, Any]], done: Mapping[str, int]) -> TelemetryTraining:
    """Of all stages of a peer: they share its lane, the other figures are of the first that has them."""
    first = reports[0]
    loss = next((loss for one in reports if (loss := one.get("loss")) is not None), None)
    return TelemetryTraining(
        stage=int(first.get("stage", 0)),
        **(done or counts_of(first)),
        lane_busy_s=first.get("lane_busy_s", 0.0),
        lane_finished=int(first.get("lane_finished", 0)),
        tokens_per_s=max(one.get("tokens_per_s", 0.0) for one in reports),
        loss=_measured(loss),
        learning_rate=_measured(first.get("learning_rate")),
        checkpoint_height=first.get("checkpoint", {}).get("height") or 0,
        sessions=sum(one.get("sessions", {}).get("sessions", 0) for one in reports),
    )


def _links(reports: Sequence[Mapping[str, Any]], view: SwarmView) -> tuple[TelemetryLink, ...]:
    next_stage = {str(known["peer"]): known for one in reports for known in one.get("next_stage", ())}
    links = []
    for member in view.here():
        known = next_stage.get(member.peer, {})
        if member.peer == view.me or (member.rtt_s is None and not known):
            continue
        rtt_s = -1.0 if member.rtt_s is None else member.rtt_s
        rate = min(float(known.get("bytes_per_s") or 0.0), 1e12)
        links.append(TelemetryLink(member.peer, rtt_s, rate, known.get("failures", 0)))
    return tuple(links[:LINKS])


def _measured(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) and value >= 0.0 else -1.0


class Told:
    """The newest figures of one peer, and rates over the last of them."""

    def __init__(self, process: int) -> None:
        self.process = process
        self.number = 0  # of its last event that was taken
        self.figures: TelemetryFigures | None = None
        self.told_s = -math.inf  # loop time
        self.links: tuple[TelemetryLink, ...] = ()  # those with a measured bandwidth first, then the longest
        self.dropped = 0
        self._marks: deque[tuple[float, float, int, int]] = deque(maxlen=_MARKS)  # uptime, busy, out, in

    def take(self, figures: TelemetryFigures, now_s: float) -> None:
        """Newer figures of the same process."""
        busy_s = figures.training.lane_busy_s if figures.training else 0.0
        mark = (figures.uptime_s, busy_s, figures.bytes_out, figures.bytes_in)
        if self._marks and any(new < old for new, old in zip(mark, self._marks[-1], strict=True)):
            self._marks.clear()  # another stage: counters began anew
        self._marks.append(mark)
        while len(self._marks) > 2 and figures.uptime_s - self._marks[1][0] >= _WINDOW_S:
            self._marks.popleft()
        self.figures, self.told_s = figures, now_s
        self.links = tuple(sorted(figures.links, key=lambda link: (link.bytes_per_s <= 0.0, -link.rtt_s)))

    @property
    def busy_share(self) -> float | None:
        """Of its lane, of late; None for a peer without a stage."""
        rate = self._rate(1) if self.figures is not None and self.figures.training is not None else None
        return None if rate is None else min(1.0, rate)

    @property
    def up_bytes_per_s(self) -> float | None:
        return self._rate(2)

    @property
    def down_bytes_per_s(self) -> float | None:
        return self._rate(3)

    def _rate(self, column: int) -> float | None:
        if len(self._marks) < 2:
            return None
        first, last = self._marks[0], self._marks[-1]
        return (last[column] - first[column]) / (last[0] - first[0]) if last[0] > first[0] else None


ToldBy = Mapping[PeerId, Told]
