"""All faults that the tests know: every message of rounds and recovery, every step between, every action.

The same table for virtual time (`test_fault_points`) and for real processes (`fault_cases`).
"""

from __future__ import annotations

from dataclasses import dataclass

import shoal.training.outer.service  # noqa: F401  (it and what it imports define the steps)
from shoal.protocol import faults, wire
from shoal.protocol.faults import PLACES, Action
from shoal.training.outer import messages

DELAY_S = 3.0
_ELSEWHERE = (  # of checkpoints, `pipeline_table`, `transfer_table`
    *("test.", "checkpoint.", "chain.", "gradient.", "step."),
    *("copy.", "leave.", "drain.", "stage."),
)
STEPS = [step for step in faults.steps() if not step.startswith(_ELSEWHERE)]
_LAGGARD = {"EntriesRequest", "EntryItem"}
_JOINER = {"ManifestRequest", "Manifest", "ChunkRequest", "Chunk", "chunk"}
_BROKEN = {"StateRequest", "StateDigests", "StatePart"}
_GUARDIAN = {"Keep", "Kept"}
_REQUESTS = {
    *("Keep", "EntriesRequest", "ManifestRequest", "ChunkRequest", "PartRequest", "StateRequest"),
    "OrdersRequest",
}


@dataclass(frozen=True, slots=True)
class Case:
    """An action at a point."""

    point: str
    action: Action
    nth: int = 1

    @property
    def message(self) -> str:
        """The part before the dot: a message, or the thing of a step."""
        return self.point.partition(".")[0]

    @property
    def sends(self) -> bool:
        """Whether it strikes the sender."""
        return not self.point.endswith(".received")

    @property
    def strikes_asker(self) -> bool:
        """Of a request, or its answer; else it strikes who is asked."""
        return self.message == "chunk" or (self.message in _REQUESTS) == self.sends

    @property
    def needs_laggard(self) -> bool:
        """Somebody who missed rounds replays them."""
        return self.message in _LAGGARD

    @property
    def needs_joiner(self) -> bool:
        """Somebody who comes new takes a snapshot."""
        return self.message in _JOINER

    @property
    def needs_broken(self) -> bool:
        """Somebody's memory is not what it was."""
        return self.message in _BROKEN

    @property
    def needs_guardian(self) -> bool:
        """A lone replica has a guardian; `test_guardian_faults`."""
        return self.message in _GUARDIAN

    @property
    def needs_disk(self) -> bool:
        """Replicas keep a journal."""
        return self.message == "disk"

    @property
    def tells_lies(self) -> bool:
        """Whether the log counts what nobody did: a broken contribution within its own norm."""
        return self.message == "ContributedPart" and self.action is Action.CORRUPT

    @property
    def arming(self) -> str:
        """For `Arming.parse`."""
        delay = f" seconds={DELAY_S}" if self.action is Action.DELAY else ""
        nth = f" nth={self.nth}" if self.nth > 1 else ""
        return f"{self.point} {self.action.value}{delay}{nth}"

    def __str__(self) -> str:
        return f"{self.point} {self.action.value}{f' nth={self.nth}' if self.nth > 1 else ''}"


def all_cases() -> list[Case]:
    """Every message of rounds and recovery at each of its points, every step, each action that fits."""
    known = vars(messages).items()
    names = sorted(n for n, kind in known if wire.is_message(n) and kind.__module__ == messages.__name__)
    points = [*(f"{name}.{place}" for name in names for place in PLACES), *STEPS]
    return [Case(point, action) for point in points for action in Action if _fits(point, action)]


def mid_transfer() -> list[Case]:
    """Kill and freeze amid the parts of a stream."""
    points = [f"{name}.{place}" for name in ("ContributedPart", "PublishedPart") for place in PLACES]
    return [Case(point, action, nth=3) for point in points for action in (Action.KILL, Action.FREEZE)]


def _fits(point: str, action: Action) -> bool:
    if point in STEPS:
        return action not in (Action.DROP, Action.CORRUPT)
    return action is not Action.CORRUPT or not point.endswith(".sent")
