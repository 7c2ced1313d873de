"""P2 over a pipeline of real processes, from what every life of every replica said that it applied.

Pure: accounts in, findings out. `pipeline_group` collects them. A life that was killed said its last at the
moment of the blow, so nothing that it did is unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Id = tuple[str, int]  # "driver/incarnation", number
Spans = Mapping[str, Sequence[Sequence[int]]]  # driver/incarnation -> half-open intervals


@dataclass(frozen=True, slots=True)
class Account:
    """What one life of one replica applied, and what it said that it lost or dropped."""

    name: str
    stage: int
    applied: Spans
    lost: frozenset[int] = frozenset()  # as a driver: numbers of its own that some hop never took
    dropped: frozenset[tuple[str, int]] = frozenset()  # as a hop: (driver, number)
    driver: str = ""  # "driver/incarnation" of this life

    def ids(self) -> frozenset[Id]:
        """Applied micro-batches, one by one."""
        spans = ((driver, span) for driver, found in self.applied.items() for span in found)
        return frozenset((driver, number) for driver, span in spans for number in range(span[0], span[1]))


@dataclass(slots=True)
class Audit:
    """What came out."""

    decided: int = 0
    applied: int = 0  # at stages behind the first
    excused: int = 0  # missing at a stage, and somebody said so
    unexplained: list[str] = field(default_factory=list)  # missing, and nobody did
    twice: list[str] = field(default_factory=list)  # at two replicas of a stage
    undecided: list[str] = field(default_factory=list)  # applied though no driver decided it

    @property
    def broken(self) -> list[str]:
        """What P2 forbids."""
        found = [("applied twice", self.twice), ("applied without a decision", self.undecided)]
        found.append(("missing and not counted", self.unexplained))
        return [f"{what}: {', '.join(ids[:5])} ({len(ids)})" for what, ids in found if ids]


def audit(accounts: Sequence[Account], stages: int, before: Iterable[Id] = ()) -> Audit:
    """Of all lives there ever were; `before`: what earlier audits have settled is not counted again."""
    found = Audit()
    settled = frozenset(before)
    decided = _once(accounts, 0, found) - settled
    found.decided = len(decided)
    lost = {(account.driver, number) for account in accounts for number in account.lost}
    for stage in range(1, stages):
        applied = _once(accounts, stage, found) - settled
        found.applied += len(applied & decided)
        found.undecided += [_said(stage, id_) for id_ in sorted(applied - decided)]
        dropped = {id_ for a in accounts if a.stage == stage for id_ in a.dropped}
        for id_ in sorted(decided - applied):
            if id_ in lost or (id_[0].partition("/")[0], id_[1]) in dropped:
                found.excused += 1
            else:
                found.unexplained.append(_said(stage, id_))
    return found


def _once(accounts: Sequence[Account], stage: int, found: Audit) -> frozenset[Id]:
    counts = Counter(id_ for account in accounts if account.stage == stage for id_ in account.ids())
    found.twice += [_said(stage, id_) for id_, count in sorted(counts.items()) if count > 1]
    return frozenset(counts)


def _said(stage: int, id_: Id) -> str:
    driver, number = id_
    return f"{driver[-10:]}:{number} at {stage}"
