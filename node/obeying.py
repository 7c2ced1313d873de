"""What the owner orders of this process, done. The daemon runs it; the trainer sees to pauses itself."""

from __future__ import annotations

from collections.abc import Callable

from shoal.protocol.amendments import DRAIN, STOPPED, AmendmentBook, Amendments, Errand
from shoal.protocol.identity import PeerId


async def leave_when_told(
    book: AmendmentBook, me: PeerId, begun: int, leave: Callable[[str, bool], None], *, stays: bool
) -> None:
    """Calls `leave(reason, at_once)` when the owner's list says so; until cancelled.

    `begun`: this process's first incarnation. `stays`: it outlives the run's end, so that who comes late
    hears of it (the owner's peer).
    """
    with book.watch() as changed:
        while True:
            changed.clear()
            errand = errand_for(book.current, me, begun)
            if errand is not None:
                reason = f": {errand.reason}" if errand.reason else ""
                leave(f"the run's owner asked for it{reason}", errand.kind != DRAIN)
            elif book.current.state == STOPPED and not stays:
                leave("the run's owner has stopped the run", False)
            await changed.wait()


def errand_for(listed: Amendments, me: PeerId, begun: int) -> Errand | None:
    """What is ordered of the process of a peer that began with this incarnation; the latest counts.

    A process that came back has a later one than its owner could know, so an old errand is not its own.
    """
    mine = [e for e in listed.errands if e.peer == me and begun <= e.incarnation]
    return mine[-1] if mine else None
