"""What events add up to: rounds for the waterfall, losses, markers, churn, reroutes, the last checkpoint.

Fed in any order with what happened here and what others told; everything is bounded, and what one peer claims
of rounds takes only that peer's own room. No I/O, no clock.
"""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shoal.node.view.parts import (
    Checkpoints,
    Churn,
    EventRow,
    Histogram,
    LossPoint,
    Marker,
    Phase,
    Round,
    RoundMember,
    Totals,
)
from shoal.node.view.snapshot import EVENTS, LOSS_POINTS, MARKERS, ROUNDS
from shoal.node.view.texts import Value

ROUNDS_OF_A_PEER = 24
ROUND_MEMBERS = 12  # shown of one round: those that took longest
REPORTERS = 2048
TELLERS = 64  # of one loss
SESSIONS = REROUTES = 2048
KINDS = 256
BOUNDS_S = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
HOUR_S = 3600.0
PHASES = ("inner", "prepare", "wait", "send", "reduce", "collect", "decide", "apply")
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


@dataclass(frozen=True, slots=True)
class ToldRound:
    """A round as one member told it."""

    row: EventRow
    stage: int
    height: int
    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        """From the beginning of `prepare` to the end; inner compute goes before."""
        return max((p.start_s + p.seconds for p in self.phases if p.name != "inner"), default=0.0)


class Tally:
    """See the module."""

    def __init__(self) -> None:
        self.events: deque[EventRow] = deque(maxlen=EVENTS)
        self.compression: dict[int, EventRow] = {}  # stage -> the round that says it
        self._rounds: OrderedDict[str, deque[ToldRound]] = OrderedDict()  # by who told
        self._losses: dict[int, _Losses] = {}  # by tokens
        self._markers: deque[Marker] = deque(maxlen=MARKERS)
        self._joined: OrderedDict[str, float] = OrderedDict()
        self._joins: deque[float] = deque(maxlen=SESSIONS)
        self._sessions: deque[tuple[float, float]] = deque(maxlen=SESSIONS)  # (end, seconds)
        self._reroutes: deque[tuple[float, float]] = deque(maxlen=REROUTES)
        self._whole: EventRow | None = None
        self._refused: EventRow | None = None
        self._parts: dict[int, int] = {}  # stage -> height on a replica's disk
        self._reroute_seconds = Buckets()
        self._phase_seconds = {name: Buckets() for name in PHASES}
        self._own = Counter[str]()  # events by kind

    def take(self, row: EventRow, *, mine: bool, tokens: int, stages: int) -> None:
        """An event; `mine`: this peer's own. `tokens`, `stages`: how far the run is, how many it has."""
        fields = row.fields
        if row.kind not in SHOWN_ELSEWHERE:
            self.events.append(row)
        if mine:
            self._count(row)
        if row.kind in FAULTS:
            self._markers.append(Marker(at=row.at, tokens=tokens, kind=row.kind, text=row.text))
        match row.kind:
            case "round":
                self._take_round(row, stages)
            case "held-out":
                self.take_loss(row)
            case "reroute":
                self._reroutes.append((row.at, number(fields, "seconds") or 0.0))
            case "checkpoint":
                self._take_checkpoint(row, mine, stages)
            case "checkpoint-refused":
                self._refused = row
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

    def told_rounds(self) -> Iterator[ToldRound]:
        """All that is kept, whoever told it."""
        for told in self._rounds.values():
            yield from told

    def rounds(self, heights: Sequence[int], names: Mapping[str, str]) -> tuple[Round, ...]:
        """The newest, those of all stages together; `heights` of the stages bound what can have been."""
        found: dict[tuple[int, int], list[ToldRound]] = {}
        for told in self.told_rounds():
            if told.stage < len(heights) and told.height <= heights[told.stage] + 1:
                found.setdefault((told.stage, told.height), []).append(told)
        newest = sorted(found.values(), key=lambda members: min(told.row.at for told in members))[-ROUNDS:]
        return tuple(_round(members, names) for members in newest)

    def bytes_of(self, stage: int, height: int) -> int:
        """Sent by all who told of that round."""
        told = (told for told in self.told_rounds() if (told.stage, told.height) == (stage, height))
        return sum(_whole(one.row.fields, "bytes_out") for one in told)

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
        whole, refused = self._whole, self._refused
        stages = {str(stage): height for stage, height in sorted(self._parts.items())}
        why = refused.text if refused is not None and (whole is None or refused.at > whole.at) else ""
        if whole is None:
            return Checkpoints(stages=stages, refused=why)
        heights = str(whole.fields.get("heights", "")).split(", ")
        return Checkpoints(
            at=whole.at,
            age_s=max(0.0, now - whole.at),
            path=str(whole.fields.get("path", "")),
            bytes=_whole(whole.fields, "bytes"),
            heights=tuple(int(height) for height in heights if height.isascii() and height.isdigit()),
            stages=stages,
            refused=why,
        )

    def totals(self) -> Totals:
        """Of this peer's own events."""
        return Totals(
            reroutes=self._reroute_seconds.histogram(),
            phases={name: buckets.histogram() for name, buckets in self._phase_seconds.items()},
            events=dict(self._own),
        )

    # --- taking

    def _count(self, row: EventRow) -> None:
        if len(self._own) < KINDS or row.kind in self._own:
            self._own[row.kind] += 1
        if row.kind == "reroute":
            self._reroute_seconds.add(number(row.fields, "seconds") or 0.0)
        if row.kind == "round":
            for phase in _phases(row.fields):
                self._phase_seconds[phase.name].add(phase.seconds)

    def _take_round(self, row: EventRow, stages: int) -> None:
        stage, height = _whole(row.fields, "stage", -1), _whole(row.fields, "height", -1)
        if not 0 <= stage < stages or height < 1:
            return
        kept = self._rounds.setdefault(row.peer, deque(maxlen=ROUNDS_OF_A_PEER))
        self._rounds.move_to_end(row.peer)
        if len(self._rounds) > REPORTERS:
            self._rounds.popitem(last=False)
        if any((told.stage, told.height) == (stage, height) for told in kept):
            return
        kept.append(ToldRound(row, stage, height, tuple(_phases(row.fields))))
        if "bits_per_value" in row.fields:
            self.compression[stage] = row
        self.take_loss(row)

    def take_loss(self, row: EventRow) -> None:
        """What a round of the first stage or a held-out score says; also of events long past."""
        loss, tokens = number(row.fields, "loss"), _whole(row.fields, "log_tokens")
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
            self._whole = row if mine or self._whole is None else self._whole
        elif stage.isascii() and stage.isdigit() and int(stage[:4]) < stages:
            height = _whole(row.fields, "height")
            self._parts[int(stage)] = max(self._parts.get(int(stage), 0), height)

    def _point(self, tokens: int, at: float) -> _Losses:
        if tokens not in self._losses and len(self._losses) >= 2 * LOSS_POINTS:
            for thinned in sorted(self._losses)[1::2]:
                del self._losses[thinned]
        return self._losses.setdefault(tokens, _Losses(at))


class Buckets:
    """A histogram that grows."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(BOUNDS_S, seconds)] += 1
        self._sum += seconds

    def histogram(self) -> Histogram:
        counts = tuple(itertools.accumulate(self._counts))
        return Histogram(bounds=BOUNDS_S, counts=counts, sum=self._sum)


def _round(members: Sequence[ToldRound], names: Mapping[str, str]) -> Round:
    first = min(members, key=lambda told: told.row.at)
    by_phase: dict[str, tuple[float, str]] = {}
    for told in members:
        for phase in told.phases:
            by_phase[phase.name] = max(by_phase.get(phase.name, (-1.0, "")), (phase.seconds, told.row.peer))
    longest = sorted(members, key=lambda told: (-told.seconds, told.row.peer))[:ROUND_MEMBERS]
    fields = first.row.fields
    return Round(
        stage=first.stage,
        height=first.height,
        at=first.row.at,
        seconds=max(told.seconds for told in members),
        tokens=_whole(fields, "tokens"),
        contributors=_whole(fields, "contributors"),
        skipped=_whole(fields, "skipped"),
        bytes_out=sum(_whole(told.row.fields, "bytes_out") for told in members),
        codecs=tuple(str(fields.get("codecs", "")).split(", ")),
        leader=str(fields.get("leader", "")),
        members=tuple(
            RoundMember(
                peer=told.row.peer,
                name=names.get(told.row.peer, told.row.name),
                bytes_out=_whole(told.row.fields, "bytes_out"),
                phases=told.phases,
            )
            for told in longest
        ),
        slowest={name: peer for name, (_, peer) in by_phase.items()},
    )


def _phases(fields: Mapping[str, Value]) -> Iterable[Phase]:
    for name in PHASES:
        start_s, seconds = number(fields, f"phases.{name}.start_s"), number(fields, f"phases.{name}.s")
        if start_s is not None and seconds is not None and abs(start_s) < 1e6 and 0.0 <= seconds < 1e6:
            yield Phase(name=name, start_s=start_s, seconds=seconds)


def number(fields: Mapping[str, Value], name: str) -> float | None:
    """A field, if it is a number."""
    value = fields.get(name)
    return value if isinstance(value, float) else None


def _whole(fields: Mapping[str, Value], name: str, otherwise: int = 0) -> int:
    """A counter; `otherwise` where it is none."""
    value = fields.get(name)
    return int(value) if isinstance(value, float) and 0.0 <= value < 2**53 else otherwise


def _quantile(values: Sequence[float], share: float) -> float | None:
    return values[min(len(values) - 1, int(share * len(values)))] if values else None
