"""What becomes of a micro-batch that nobody has decided yet, and how many a hop may hold: pure policies.

Promise P2: a weight gradient counts at most once at a stage, and is missing only where its replica died or a
partition hid the decision. The driver decides by applying its own part; its commit tells every hop. A hop
that hears nothing asks the others of its chain.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from shoal.training.pipeline.messages import APPLIED, TENTATIVE, Link, Verdict

CALLER_SHARE = 4.0  # of what is free: one caller alone gets four fifths of all, two get four ninths each


class Outcome(enum.Enum):
    """What to do with an undecided micro-batch."""

    APPLY = "apply"
    ABANDON = "abandon"  # decided without this attempt, or given up by its driver: nothing is missing
    DROP = "drop"  # nobody can say any more: its gradient may be missing here, and is counted
    HOLD = "hold"


def outcome(
    own: Link, verdicts: Mapping[Link, Verdict | None], *, driver_departed: bool, age_s: float, ttl_s: float
) -> Outcome:
    """Of one attempt, given what those other hops of its chain say that may still be there; None: no answer.

    One hop that applied settles it. Silence does not: who is only frozen or cut off may know the decision, or
    make it when it wakes; so it is held for its time, and as long as its driver says that it is at it.
    """
    applied = [found for found in verdicts.values() if found is not None and found.decision == APPLIED]
    if any(own in found.chain for found in applied):
        return Outcome.APPLY
    if any(found.chain for found in applied):
        return Outcome.ABANDON
    from_driver = next((found for link, found in verdicts.items() if link.stage == 0), None)
    if from_driver is not None and from_driver.decision == TENTATIVE:
        return Outcome.HOLD
    everybody_answered = all(found is not None for link, found in verdicts.items() if link.stage != 0)
    if everybody_answered and from_driver is not None and not driver_departed:
        return Outcome.ABANDON  # the process that should decide has forgotten it
    if everybody_answered and driver_departed:
        return Outcome.DROP
    return Outcome.DROP if age_s >= ttl_s else Outcome.HOLD


def admits(held_by_caller: int, held: int, most: int) -> bool:
    """Whether a caller may leave one more micro-batch here.

    Each may hold CALLER_SHARE times what is still free (dynamic thresholds, Choudhury and Hahne 1998): no
    caller can fill the memory, and some is left for whoever comes next.
    """
    return held < most and held_by_caller < CALLER_SHARE * (most - held)
