"""What a fault came to, what of it was promised, and the table of many. Played by `fault_cases`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal.protocol.faults import Action

GOALS_S = {Action.KILL: 3.0, Action.FREEZE: 6.0}  # from the blow until the last of the others had committed
GOAL_BYTES = 1.05  # what the others sent, by what they sent in a clean round; after a kill


class Fault(Protocol):
    """A `fault_table.Case`, or a `fault_doubles.Double`."""

    @property
    def action(self) -> Action: ...

    @property
    def arming(self) -> str: ...

    @property
    def needs_joiner(self) -> bool: ...

    @property
    def tells_lies(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case came to."""

    case: Fault
    struck: str  # which process
    seconds: float  # from the blow until the last of the others had committed
    bytes_ratio: float | None  # what the others sent in that round, by what they sent in a clean one
    came_back: (
        str  # the one that was struck: "in time", "replay", "switch" of chains, "snapshot", "new process"
    )
    rejoined_s: float | None = None  # from its wake until it had the others' head
    stalled_s: float = 0.0  # the longest that the machine let one of the others stand still meanwhile

    def misses(self) -> list[str]:
        """What was promised otherwise."""
        action, missed = self.case.action, []
        if self.seconds >= GOALS_S.get(action, self.seconds + 1.0):
            missed.append(f"LATE: {GOALS_S[action]:g} s are allowed")
        if action is Action.KILL and self.bytes_ratio is not None and self.bytes_ratio > GOAL_BYTES:
            missed.append(f"HEAVY: {GOAL_BYTES:g} times the bytes are allowed")
        if action is Action.FREEZE and self.came_back == "snapshot" and not self.case.needs_joiner:
            missed.append("SNAPSHOT: replay is promised")
        return missed

    def __str__(self) -> str:
        spent = "    -" if self.bytes_ratio is None else f"{self.bytes_ratio:5.3f}"
        back = "" if self.rejoined_s is None else f", {self.rejoined_s:.2f} s after its wake"
        missed = "".join(f"  {miss}" for miss in self.misses())
        missed += f"  (the machine stood still for {self.stalled_s:.1f} s)" if self.stalled_s else ""
        measured = f"{self.seconds:6.2f} s  bytes {spent}"
        return f"{self.case!s:40} {self.struck:7} {measured}  {self.came_back}{back}{missed}"


def figures(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Median and most of what was measured, in JSON's types."""
    seconds = [outcome.seconds for outcome in outcomes]
    ratios = [outcome.bytes_ratio for outcome in outcomes if outcome.bytes_ratio is not None]
    rejoined = [outcome.rejoined_s for outcome in outcomes if outcome.rejoined_s is not None]
    return {
        "cases": len(outcomes),
        "seconds": _median_and_most(seconds),
        "bytes_ratio": _median_and_most(ratios),
        "rejoined_s": _median_and_most(rejoined),
        "came_back": dict(Counter(outcome.came_back for outcome in outcomes)),
    }


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines for people, one an action."""
    lines = [
        f"{'action':8} {'cases':>5}  {'seconds':>13}  {'bytes ratio':>13}  {'s after wake':>13}  came back"
    ]
    for action in Action:
        if of := [outcome for outcome in outcomes if outcome.case.action is action]:
            found = figures(of)
            pairs = [found["seconds"], found["bytes_ratio"], found["rejoined_s"]]
            columns = "  ".join(f"{_said(pair):>13}" for pair in pairs)
            back = ", ".join(
                f"{count} {how}" for how, count in sorted(Counter(o.came_back for o in of).items())
            )
            lines.append(f"{action.value:8} {len(of):5}  {columns}  {back}")
    return lines


def _median_and_most(values: Sequence[float]) -> list[float]:
    return [round(statistics.median(values), 3), round(max(values), 3)] if values else []


def _said(pair: object) -> str:
    return " / ".join(f"{value:.2f}" for value in pair) if isinstance(pair, list) and pair else "-"
