"""Rounds as their members told them, for the waterfall. What one peer claims takes only its own room."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shoal.node.view.parts import Compression, EventRow, Phase, Round, RoundMember
from shoal.node.view.snapshot import ROUNDS
from shoal.node.view.texts import Value, number, whole

ROUNDS_OF_A_PEER = 24
ROUND_MEMBERS = 12  # shown of one round: those that took longest
REPORTERS = 2048
PHASES = ("inner", "prepare", "wait", "send", "reduce", "collect", "decide", "apply")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldRound:
    """A round as one member told it."""

    peer: str
    name: str
    at: float
    stage: int
    height: int
    tokens: int
    contributors: int
    skipped: int
    bytes_out: int
    codecs: str
    leader: str
    phases: tuple[Phase, ...]
    bits_per_value: float | None
    residual_norm: float | None
    update_norm: float | None

    @property
    def seconds(self) -> float:
        """From the beginning of `prepare` to the end; inner compute goes before."""
        return max((p.start_s + p.seconds for p in self.phases if p.name != "inner"), default=0.0)


class Rounds:
    """The last of each peer that tells."""

    def __init__(self) -> None:
        self._told: OrderedDict[str, deque[ToldRound]] = OrderedDict()
        self._members: dict[tuple[int, int], list[ToldRound]] = {}  # the same, by stage and height
        self._rows: dict[tuple[int, int], tuple[int, Round]] = {}  # of so many members, as last shown

    def take(self, row: EventRow, stages: int) -> None:
        """A `round` event; one that cannot be, or is told again, is left out."""
        fields = row.fields
        stage, height = whole(fields, "stage", -1), whole(fields, "height", -1)
        if not 0 <= stage < stages or height < 1:
            return
        kept = self._told.setdefault(row.peer, deque())
        self._told.move_to_end(row.peer)
        if len(self._told) > REPORTERS:
            self._forget(*self._told.popitem(last=False)[1])
        if any((told.stage, told.height) == (stage, height) for told in kept):
            return
        if len(kept) >= ROUNDS_OF_A_PEER:
            self._forget(kept.popleft())
        kept.append(
            ToldRound(
                peer=row.peer,
                name=row.name,
                at=row.at,
                stage=stage,
                height=height,
                tokens=whole(fields, "tokens"),
                contributors=whole(fields, "contributors"),
                skipped=whole(fields, "skipped"),
                bytes_out=whole(fields, "bytes_out"),
                codecs=str(fields.get("codecs", "")),
                leader=str(fields.get("leader", "")),
                phases=tuple(phases_of(fields)),
                bits_per_value=number(fields, "bits_per_value"),
                residual_norm=number(fields, "residual_norm"),
                update_norm=number(fields, "update_norm"),
            )
        )
        self._members.setdefault((stage, height), []).append(kept[-1])

    def _forget(self, *gone: ToldRound) -> None:
        for told in gone:
            key = (told.stage, told.height)
            self._members[key].remove(told)
            self._rows.pop(key, None)
            if not self._members[key]:
                del self._members[key]

    def told(self, most: int) -> Iterator[ToldRound]:
        """The last so many of each who told."""
        for told in self._told.values():
            yield from itertools.islice(told, max(0, len(told) - most), None)

    def shown(self, heights: Sequence[int], names: Mapping[str, str]) -> tuple[Round, ...]:
        """The newest, those of all stages together; `heights` of the stages bound what can have been."""
        newest = sorted(self._possible(heights), key=lambda key: (self._members[key][0].at, key))[-ROUNDS:]
        return tuple(self._row(key, names) for key in newest)

    def _row(self, key: tuple[int, int], names: Mapping[str, str]) -> Round:
        members = self._members[key]
        count, row = self._rows.get(key, (0, None))
        if row is None or count != len(members):
            row = _round(members, names)
            self._rows[key] = len(members), row
        return row

    def compression(self, heights: Sequence[int]) -> tuple[Compression, ...]:
        """What the last round of each stage says."""
        last: dict[int, int] = {}
        for stage, height in self._possible(heights):
            last[stage] = max(last.get(stage, 0), height)
        return tuple(
            _compression(stage, self._members.get((stage, last.get(stage, 0)), []))
            for stage in range(len(heights))
        )

    def _possible(self, heights: Sequence[int]) -> list[tuple[int, int]]:
        return [key for key in self._members if key[0] < len(heights) and key[1] <= heights[key[0]] + 1]


def phases_of(fields: Mapping[str, Value]) -> Iterable[Phase]:
    """Those that a `round` event tells, as far as they can be."""
    for name in PHASES:
        start_s, seconds = number(fields, f"phases.{name}.start_s"), number(fields, f"phases.{name}.s")
        if start_s is not None and seconds is not None and abs(start_s) < 1e6 and 0.0 <= seconds < 1e6:
            yield Phase(name=name, start_s=start_s, seconds=seconds)


def _round(members: Sequence[ToldRound], names: Mapping[str, str]) -> Round:
    first = min(members, key=lambda told: told.at)
    by_phase: dict[str, tuple[float, str]] = {}
    for told in members:
        for phase in told.phases:
            by_phase[phase.name] = max(by_phase.get(phase.name, (-1.0, "")), (phase.seconds, told.peer))
    longest = sorted(members, key=lambda told: (-told.seconds, told.peer))
    return Round(
        stage=first.stage,
        height=first.height,
        at=first.at,
        seconds=longest[0].seconds,
        tokens=first.tokens,
        contributors=first.contributors,
        skipped=first.skipped,
        bytes_out=sum(told.bytes_out for told in members),
        codecs=tuple(first.codecs.split(", ")),
        leader=first.leader,
        members=tuple(
            RoundMember(
                peer=told.peer,
                name=names.get(told.peer, told.name),
                bytes_out=told.bytes_out,
                phases=told.phases,
            )
            for told in longest[:ROUND_MEMBERS]
        ),
        slowest={name: peer for name, (_, peer) in by_phase.items()},
    )


def _compression(stage: int, members: Sequence[ToldRound]) -> Compression:
    bits = [told.bits_per_value for told in members if told.bits_per_value]
    if not bits:
        return Compression(stage=stage)
    contribution, _, published = members[0].codecs.partition(", ")
    mean = sum(bits) / len(bits)
    return Compression(
        stage=stage,
        contribution=contribution,
        published=published,
        bits_per_value=mean,
        ratio=32.0 / mean,
        round_bytes=sum(told.bytes_out for told in members),
        residual_norm=max((told.residual_norm or 0.0 for told in members), default=None),
        update_norm=max((told.update_norm or 0.0 for told in members), default=None),
    )
