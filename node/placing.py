"""Which stage a peer takes when it joins: it looks around, chooses, announces, and looks again.

`training.placement` decides; the daemon and the simulator's peers call this. A joiner's time counts twice:
what it would do is missing at its stage, and the other stages wait for that one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from shoal.dht.liveness import Liveness
from shoal.dht.members import Members
from shoal.dht.view import SwarmView
from shoal.training.neighbours import LOOKUPS
from shoal.training.placement import place

_MEET_S = 1.0  # a new peer looks around this long at most before it chooses a stage: ...
_QUIET_S = 0.3  # ... until nobody new came for so long, and all are heard or known to be gone
_LOOK_S = 0.05  # between two looks, beats or not
_SETTLE_S = 0.6  # and it looks again after each choice while others may be choosing at the same time
_SETTLE_LOOKS = 8  # by then who never answers is gone


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
        view = members.view()
        if (names := frozenset(member.peer for member in view.members)) != known:
            known, quiet_since_s = names, now_s
        looked = members.lookups >= LOOKUPS and len(known) > 1
        if looked and not _strangers(view) and now_s - quiet_since_s >= _QUIET_S:
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
        if not _is_open(members.view()):
            break
        await asyncio.sleep(_SETTLE_S)
        again = look_again(members, announce, costs, stage)
        if again == stage and not _strangers(members.view()):
            break
        stage = again
    return stage


def look_again(
    members: Members, announce: Callable[[str, tuple[int, ...]], None], costs: Sequence[float], stage: int
) -> int:
    """Where it is needed now; for as long as nothing was fetched for the stage that it has chosen."""
    again = place(members.view(), members.me, costs)
    if again != stage:
        announce("joining", (again,))
    return again


def _is_open(view: SwarmView) -> bool:
    """Whether a second look may show something else: others join, too, or may not be here any more.

    Whoever is not known to join yet sees what was announced here before it chooses.
    """
    others_join = any(other.state == "joining" and other.peer != view.me for other in view.here())
    return others_join or _strangers(view)


def _strangers(view: SwarmView) -> bool:
    """Whether there is somebody of whom nothing was heard; of a large swarm that says nothing."""
    return not view.sizes and any(
        member.heard_s is None and member.liveness is not Liveness.GONE for member in view.members
    )
