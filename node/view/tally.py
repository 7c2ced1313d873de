"""What events add up to: rounds, losses, markers, churn, reroutes, the last checkpoint.

Fed in any order with what happened here and what others told; everything is bounded. No I/O, no clock.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.node.view.parts import Checkpoints, Churn, EventRow, LossPoint, Marker
from shoal.node.view.rounds import Rounds
from shoal.node.view.snapshot import EVENTS, LOSS_POINTS, MARKERS
from shoal.node.view.texts import number, whole
from shoal.node.view.totals import Counts

TELLERS = 64  # of one loss
SESSIONS = REROUTES = 2048
HOUR_S = 3600.0
SHOWN_ELSEWHERE = frozenset({"round", "held-out"})  # the feed would be full of them
FAULTS = frozenset(
    [
        "stage-lost",
        "stage-found",
        "stage-rescued",
        "stage-restored",
        "stage-rebuilt",
        "lost-for-good",
        "moving",
        "order",
        "fork",
        "checkpoint-refused",
        "weights-not-finite",
        "state-differs",
        "repaired",
        "peer_gone",
    ]
)


@dataclass(slots=True)
class _Losses:
    """What drivers told at one point of the run."""

    at: float
    train: dict[str, float] = field(default_factory=dict)
    held_out: float | None = None


class Tally:
    """See the module."""

    def __init__(self) -> None:
        self.events: deque[EventRow] = deque(maxlen=EVENTS)
        self.rounds = Rounds()
        self.counts = Counts()
        self._losses: dict[int, _Losses] = {}  # by tokens
        self._markers: deque[Marker] = deque(maxlen=MARKERS)
        self._joined: OrderedDict[str, float] = OrderedDict()
        self._joins: deque[float] = deque(maxlen=SESSIONS)
        self._sessions: deque[tuple[float, float]] = deque(maxlen=SESSIONS)  # (end, seconds)
        self._reroutes: deque[tuple[float, float]] = deque(maxlen=REROUTES)
        self._whole: EventRow | None = None
        self._refused: EventRow | None = None
        self._parts: dict[int, int] = {}  # stage -> height on a replica's disk

    def take(self, row: EventRow, *, mine: bool, tokens: int, stages: int, new: bool = True) -> None:
        """An event; `mine`: this peer's own, `new`: not from the history. `tokens`, `stages`: how far the run
        is, and how many it has."""
        fields = row.fields
        if row.kind not in SHOWN_ELSEWHERE:
            self.events.append(row)
        if mine and new:
            self.counts.add(row)
        if row.kind in FAULTS:
            self._markers.append(Marker(at=row.at, tokens=tokens, kind=row.kind, text=row.text))
        match row.kind:
            case "round":
                self.rounds.take(row, stages)
                self.take_loss(row)
            case "held-out":
                self.take_loss(row)
            case "reroute":
                self._reroutes.append((row.at, number(fields, "seconds") or 0.0))
            case "checkpoint":
                self._take_checkpoint(row, mine, stages)
            case "checkpoint-refused":
                self._refused = row
            case "starting" if mine:
                self._joined.clear()  # who is here is told anew
            case "peer_joined" | "peer_back" if mine:
                if (peer := str(fields.get("peer"))) not in self._joined:
                    self._joined[peer] = row.at
                    self._joins.append(row.at)
                if len(self._joined) > SESSIONS:
                    self._joined.popitem(last=False)
            case "peer_left" | "peer_gone" if mine:
                begun = self._joined.pop(str(fields.get("peer")), None)
                if begun is not None:
                    self._sessions.append((row.at, row.at - begun))

    # --- what is shown

    def loss(self) -> tuple[LossPoint, ...]:
        """By tokens, at most LOSS_POINTS; of what several drivers told, the median."""
        points = [self._losses[tokens] for tokens in sorted(self._losses)]
        step = -(-len(points) // LOSS_POINTS) or 1
        thinned = [point for i, point in enumerate(reversed(points)) if i % step == 0][::-1]
        keys = sorted(self._losses)[::-1][::step][::-1]
        return tuple(
            LossPoint(
                tokens=tokens,
                at=point.at,
                train=statistics.median(point.train.values()) if point.train else None,
                held_out=point.held_out,
            )
            for tokens, point in zip(keys, thinned, strict=True)
        )

    def markers(self) -> tuple[Marker, ...]:
        return tuple(self._markers)

    def churn(self, now: float, redone_share: float | None) -> Churn:
        """Of the last hour."""
        sessions = [seconds for end, seconds in self._sessions if now - end <= HOUR_S]
        waits = sorted(seconds for at, seconds in self._reroutes if now - at <= HOUR_S)
        return Churn(
            joins=sum(now - at <= HOUR_S for at in self._joins),
            leaves=len(sessions),
            median_session_s=statistics.median(sessions) if sessions else None,
            reroutes=len(waits),
            reroute_p50_s=_quantile(waits, 0.5),
            reroute_p95_s=_quantile(waits, 0.95),
            redone_share=redone_share,
        )

    def checkpoints(self, now: float) -> Checkpoints:
        last, refused = self._whole, self._refused
        stages = {str(stage): height for stage, height in sorted(self._parts.items())}
        why = refused.text if refused is not None and (last is None or refused.at > last.at) else ""
        if last is None:
            return Checkpoints(stages=stages, refused=why)
        heights = str(last.fields.get("heights", "")).split(", ")
        return Checkpoints(
            at=last.at,
            age_s=max(0.0, now - last.at),
            path=str(last.fields.get("path", "")),
            bytes=whole(last.fields, "bytes"),
            heights=tuple(int(height) for height in heights if height.isascii() and height.isdigit()),
            stages=stages,
            refused=why,
        )

    # --- taking

    def take_loss(self, row: EventRow) -> None:
        """What a round of the first stage or a held-out score says; also of events long past."""
        loss, tokens = number(row.fields, "loss"), whole(row.fields, "log_tokens")
        if loss is None or not tokens:
            return
        point = self._point(tokens, row.at)
        if row.kind == "held-out":
            point.held_out = loss
        elif len(point.train) < TELLERS:
            point.train[row.peer] = loss

    def _take_checkpoint(self, row: EventRow, mine: bool, stages: int) -> None:
        stage = str(row.fields.get("what", "")).removeprefix("stage ")
        if row.fields.get("what") == "all stages":
            self._whole = row if mine else self._whole  # what others gathered lies on their disks
        elif stage.isascii() and stage.isdigit() and len(stage) <= 3 and int(stage) < stages:
            height = whole(row.fields, "height")
            self._parts[int(stage)] = max(self._parts.get(int(stage), 0), height)

    def _point(self, tokens: int, at: float) -> _Losses:
        if tokens not in self._losses and len(self._losses) >= 2 * LOSS_POINTS:
            for thinned in sorted(self._losses)[1::2]:
                del self._losses[thinned]
        return self._losses.setdefault(tokens, _Losses(at))


def _quantile(values: Sequence[float], share: float) -> float | None:
    return values[min(len(values) - 1, int(share * len(values)))] if values else None
