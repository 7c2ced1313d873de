"""Which stage a peer takes when it joins: it looks around, chooses, announces, and looks again.

`training.placement` decides; the daemon and the simulator's peers call this. A joiner's time counts twice:
what it would do is missing at its stage, and the other stages wait for that one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from shoal.dht.liveness import Liveness
from shoal.dht.members import Members
from shoal.training.placement import place

_MEET_S = 1.0  # a new peer looks around this long at most before it chooses a stage: ...
_QUIET_S = 0.3  # ... until nobody new came for so long, and all are heard or known to be gone
_LOOK_S = 0.05  # between two looks, beats or not
_SETTLE_S = 0.6  # and it looks again after each choice while others may be choosing at the same time
_SETTLE_LOOKS = 6


async def meet(members: Members) -> None:
    """Look around, until a further look would show nothing else, or for as long as one may take.

    The directory shows everybody, those killed a moment ago among them; that others are not here any more is
    known once they are dialled. In a large swarm most are known by their records only.
    """
    loop = asyncio.get_running_loop()
    until_s = loop.time() + _MEET_S
    known: frozenset[str] = frozenset()
    quiet_since_s = loop.time()
    while (now_s := loop.time()) < until_s:
        others = [member for member in members.view().members if member.peer != members.me]
        if (names := frozenset(member.peer for member in others)) != known:
            known, quiet_since_s = names, now_s
        judged = all(m.heard_s is not None or m.liveness is Liveness.GONE for m in others)
        if known and judged and members.looked and now_s - quiet_since_s >= _QUIET_S:
            return
        await asyncio.sleep(min(_LOOK_S, until_s - now_s))


async def take_stage(
    members: Members, announce: Callable[[str, tuple[int, ...]], None], costs: Sequence[float]
) -> int:
    """Choose, announce, and look again until the choice holds; after `meet`.

    `costs`: of a micro-batch at each stage."""
    stage = place(members.view(), members.me, costs)
    announce("joining", (stage,))
    for _ in range(_SETTLE_LOOKS):
        if not _others_join(members):
            break
        await asyncio.sleep(_SETTLE_S)
        again = place(members.view(), members.me, costs)
        if again == stage:
            break
        stage = again
        announce("joining", (stage,))
    return stage


def _others_join(members: Members) -> bool:
    """Whoever is not known to join yet sees what was announced here before it chooses."""
    return any(other.state == "joining" and other.peer != members.me for other in members.view().here())
