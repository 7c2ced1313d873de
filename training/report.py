"""What a replica says of itself: to its group, on heartbeats, and in `shoal status`. Its trainer makes both.

All of it is read on the event loop, at any time, and changes nothing but the uplink that this peer claims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.dht.beats import Beat, StageBeat
from shoal.training.checkpoint.replica import StageCheckpoints
from shoal.training.data.stream_book import StreamBook
from shoal.training.held_out import HeldOut
from shoal.training.lane import Lane
from shoal.training.model.layout import StageLayout
from shoal.training.outer.service import Outer
from shoal.training.pipeline.station import Station
from shoal.training.reading import Reading
from shoal.training.recovery.guarding import Guarding
from shoal.training.serving.replica import ServedStage
from shoal.training.uplinks import UNKNOWN, claimed_uplink
from shoal.training.weights import Weights, learning_rate


class Progress:
    """How far the stage's log and this replica's steps have come; told while it still recovers, too."""

    def __init__(
        self, outer: Outer, weights: Weights, serving: ServedStage, lane: Lane, *, fixed: bool
    ) -> None:
        """`fixed`: it stays at this stage."""
        self._outer = outer
        self._weights = weights
        self._serving = serving
        self._lane = lane
        self._fixed = fixed
        self._uplink_bytes_per_s = UNKNOWN  # as this peer claims it

    def beat(self, tokens_per_s: float = 0.0) -> StageBeat:
        """As of now."""
        outer, weights = self._outer, self._weights
        measured = outer.context.transport.uplink_bytes_per_s()
        self._uplink_bytes_per_s = claimed_uplink(measured, self._uplink_bytes_per_s)
        return StageBeat(
            stage=outer.context.stage,
            height=outer.height,
            head=outer.head,
            state_root=outer.state_root,
            log_tokens=outer.tokens,
            inner_steps=weights.inner_steps,
            tokens=weights.tokens,
            steps_since_round=outer.steps_since_round,
            tokens_since_round=outer.tokens_since_round,
            uplink_bytes_per_s=self._uplink_bytes_per_s,
            service_s=self._lane.load().service_s,
            fixed=self._fixed,
            step_s=self._serving.claimed_step_s(),
            incarnation=outer.context.incarnation,
            tokens_per_s=tokens_per_s,
            reentering=outer.reentering,
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What a recovered replica says, from all its parts."""

    layout: StageLayout
    progress: Progress
    outer: Outer
    weights: Weights
    station: Station
    lane: Lane
    serving: ServedStage
    guarding: Guarding
    book: StreamBook
    reading: Reading | None  # of a driver
    held_out: HeldOut | None  # likewise
    checkpoints: StageCheckpoints | None

    def heartbeat(self) -> Beat:
        """What neighbours hear of this replica."""
        load, rate = self.lane.load(), self.station.tokens_per_s()
        return Beat(
            backlog_s=load.backlog_s,
            tokens_per_s=rate,
            finished_work=load.finished,
            stages=(self.progress.beat(rate),),
            guards=self.guarding.beats(),
            spare_bytes=self.guarding.spare_bytes,
            streams=self.reading.streams.claims if self.reading is not None else (),
        )

    def status(self) -> dict[str, object]:
        """Figures for `shoal status`, JSON-able, keys stable."""
        outer, weights, load = self.outer, self.weights, self.lane.load()
        figures: dict[str, object] = {
            **self.station.status(),
            "stage": outer.context.stage,
            "layers": [self.layout.layers.start, self.layout.layers.stop],
            "parameters": self.layout.size,
            "height": outer.height,
            "head": outer.head.hex(),
            "state_root": outer.state_root.hex(),
            "log_tokens": outer.tokens,
            "revision": outer.revision,
            "learning_rate": learning_rate(outer.spec, outer.tokens),
            "round_inner_steps": outer.spec.outer.inner_steps,
            "inner_steps": weights.inner_steps,
            "gradient_norm": weights.gradient_norm,
            "lane_queued": load.queued,
            "lane_backlog_s": load.backlog_s,
            "lane_busy_s": load.busy_s,
            "lane_served_s": load.served_s,
            "lane_service_s": load.service_s,
            "lane_finished": load.finished,
            "sessions": self.serving.sessions.status(),
            "held_out_loss": _number(self.held_out.loss) if self.held_out is not None else None,
            "outer": outer.status(),
            "guards": self.guarding.status(),
            "checkpoint": self.checkpoints.status() if self.checkpoints is not None else {},
        }
        if self.reading is not None:
            figures["streams"] = dict(self.book.at(weights.inner_steps))
        return figures


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
