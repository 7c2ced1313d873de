"""Which stage a peer takes when it joins: it looks around, chooses, announces, and looks again.

`training.placement` decides; the daemon and the simulator's peers call this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from shoal.dht.members import Members
from shoal.training.placement import place

_MEET_S = 1.0  # a new peer looks around this long before it chooses a stage ...
_SETTLE_S = 0.6  # ... and once more after each change, since others may be choosing at the same time
_SETTLE_LOOKS = 6


async def take_stage(
    members: Members, announce: Callable[[str, tuple[int, ...]], None], costs: Sequence[float], *, first: bool
) -> int:
    """Choose, announce, and look again until the choice holds.

    `costs`: of a micro-batch at each stage. `first`: there is nobody to meet."""
    if not first:
        await asyncio.sleep(_MEET_S)
    stage = place(members.view(), members.me, costs)
    announce("joining", (stage,))
    for _ in range(0 if first else _SETTLE_LOOKS):
        await asyncio.sleep(_SETTLE_S)
        again = place(members.view(), members.me, costs)
        if again == stage:
            break
        stage = again
        announce("joining", (stage,))
    return stage
