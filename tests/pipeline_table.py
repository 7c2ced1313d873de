"""Every fault of `soak/pipeline_faults.py`: points of the pipeline, who passes them, what happens there.

Each message of a micro-batch at each of its points, the decision, the weight gradient and the inner step, an
entry of the log, snapshots and checkpoints on disk. A stage of a pipeline of three is a part to play: the
first drives, the middle one is asked and asks, the last one ends the chain.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import shoal.training.trainer  # noqa: F401  (it and what it imports define the steps)
from shoal.protocol.faults import PLACES, Action

STAGES = 3
DELAY_S = 3.0


class Blow(enum.Enum):
    """What happens at a point: the actions of `protocol.faults`, and two that a worker makes of a freeze."""

    KILL = "kill"
    FREEZE = "freeze"
    SLOW = "slow"
    LEAVE = "leave"
    DELAY = "delay"
    DROP = "drop"
    CORRUPT = "corrupt"
    EMPTY = "empty"  # every replica of the stage is killed at this point

    @property
    def action(self) -> Action:
        """Which one is armed."""
        kinds = {Blow.SLOW: Action.FREEZE, Blow.LEAVE: Action.FREEZE, Blow.EMPTY: Action.KILL}
        return kinds[self] if self in kinds else Action(self.value)

    @property
    def other(self) -> str:
        """What a worker makes of a freeze."""
        return self.value if self in (Blow.SLOW, Blow.LEAVE) else ""


# Of anybody at any point; the others, which are of the network, once for each point.
_OF_A_PEER = (Blow.KILL, Blow.FREEZE, Blow.SLOW, Blow.LEAVE)
_OF_A_MESSAGE = (Blow.DELAY, Blow.DROP, Blow.CORRUPT)
HARMLESS = {Blow.FREEZE, Blow.SLOW, Blow.LEAVE, Blow.DELAY, Blow.DROP}  # nothing is missing after these

_FIRST, _MIDDLE, _LAST = range(STAGES)
_SENDERS = {
    "Propagate": (_FIRST, _MIDDLE),
    "Activations": (_FIRST, _MIDDLE, _LAST),
    "Working": (_MIDDLE, _LAST),
    "Gradient": (_MIDDLE, _LAST),
    "CommitChain": (_FIRST,),
    "Verdict": (_MIDDLE, _LAST),
    "QueryChain": (_MIDDLE, _LAST),
    "Adopt": (_MIDDLE,),
    "Adopted": (_LAST,),
}
_RECEIVERS = {
    "Propagate": (_MIDDLE, _LAST),
    "Activations": (_FIRST, _MIDDLE, _LAST),
    "Working": (_FIRST, _MIDDLE),
    "Gradient": (_FIRST, _MIDDLE),
    "CommitChain": (_MIDDLE, _LAST),
    "Verdict": (_FIRST,),
    "QueryChain": (_MIDDLE, _LAST),
    "Adopt": (_LAST,),
    "Adopted": (_MIDDLE,),
}
_STEPS = {
    "chain.decided": (_FIRST,),
    "gradient.adding": (_FIRST, _MIDDLE, _LAST),
    "step.made": (_FIRST, _MIDDLE, _LAST),
    "entry.applying": (_FIRST, _LAST),
    "entry.applied": (_MIDDLE,),
    "disk.writing": (_FIRST,),
    "disk.written": (_LAST,),
    "checkpoint.writing": (_MIDDLE,),
    "checkpoint.sealing": (_LAST,),
}
_EMPTIED = ("Propagate.received", "Gradient.sending", "CommitChain.received", "gradient.adding", "step.made")


@dataclass(frozen=True, slots=True)
class Case:
    """A blow at a point, to a replica of a stage."""

    point: str
    blow: Blow
    stage: int

    @property
    def message(self) -> str:
        """The part before the dot."""
        return self.point.partition(".")[0]

    @property
    def needs_slow_hops(self) -> bool:
        """Only a hop that takes long says that it works."""
        return self.message in ("Working", "Adopt", "Adopted")

    @property
    def needs_silent_driver(self) -> bool:
        """A hop asks only when it hears of no decision."""
        return self.message == "QueryChain"

    @property
    def needs_disk(self) -> bool:
        """Snapshots and checkpoints are written often."""
        return self.message in ("disk", "checkpoint")

    @property
    def needs_loss(self) -> bool:
        """Somebody is asked to adopt only where somebody else has failed before."""
        return self.message in ("Adopt", "Adopted")

    @property
    def tells_lies(self) -> bool:
        """Whether somebody's weights may have taken in what nobody computed."""
        return self.blow is Blow.CORRUPT and self.message in ("Activations", "Gradient", "Propagate")

    @property
    def arming(self) -> str:
        """For `Arming.parse`."""
        seconds = f" seconds={DELAY_S}" if self.blow is Blow.DELAY else ""
        return f"{self.point} {self.blow.action.value}{seconds}"

    def __str__(self) -> str:
        return f"{self.point} {self.blow.value} at {self.stage}"


def all_cases() -> list[Case]:
    """The whole matrix."""
    cases: list[Case] = []
    for message in _SENDERS:
        for place in PLACES:
            if place == "sent" and message in ("Adopt", "Adopted"):
                continue
            stages = (_RECEIVERS if place == "received" else _SENDERS)[message]
            point = f"{message}.{place}"
            cases += [Case(point, blow, stage) for stage in stages for blow in _OF_A_PEER]
            late = {Blow.CORRUPT} if place == "sent" else set()
            cases += [Case(point, blow, stages[-1]) for blow in _OF_A_MESSAGE if blow not in late]
    for step, stages in _STEPS.items():
        cases += [Case(step, blow, stage) for stage in stages for blow in (*_OF_A_PEER, Blow.DELAY)]
    cases += [Case(point, Blow.EMPTY, stage) for point in _EMPTIED for stage in (_MIDDLE, _LAST)]
    cases.append(Case("chain.decided", Blow.EMPTY, _FIRST))
    return cases
