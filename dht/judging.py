"""Judging: the loop in which a peer's table of others is brought up to date; part of `Members`.

Verdicts are passed when they fall due, sizes of the swarm are taken over, who is not welcome any more is shut
out, and stages are missed that nobody holds. It also notices when it was this process that stood still, for
then nobody else was silent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping

from shoal.dht.absence import Absences
from shoal.dht.circle import Circle
from shoal.dht.table import MemberTable

OWN_PAUSE_S = 1.0  # when our own loop was late by more, others are not to blame for silence
JUDGE_S = 0.25  # at most, between two looks at the table
UNWELCOME_S = 1.0  # at most, until an expired certificate shuts out its holder, or a stage is missed

log = logging.getLogger(__name__)


async def keep_judging(
    table: MemberTable,
    circle: Circle,
    absences: Absences,
    sizes: Callable[[], Mapping[int, float]],
    joining: Callable[[], Collection[int]],
    shut_out: Callable[[], None],
) -> None:
    """Until cancelled. `sizes()`: of stages, as the directory tells; `joining()`: stages that this peer waits
    for; `shut_out()`: who is unwelcome."""
    loop = asyncio.get_running_loop()
    looked_s = -UNWELCOME_S
    while True:
        now = loop.time()
        circle.take_sizes(sizes())
        if now >= looked_s + UNWELCOME_S:
            looked_s = now
            shut_out()
            absences.look(table.members(), joining(), now, table.sampled)
        due_s = min(max(table.judge_due(now), now), now + JUDGE_S)
        await asyncio.sleep(due_s - now)
        late_s = loop.time() - due_s
        if late_s > OWN_PAUSE_S:
            log.warning("this process stood still", extra={"pause_s": round(late_s, 3)})
            table.excuse(late_s)
            absences.excuse(late_s)
