"""A line in which the oldest goes first: micro-batches that wait for room at the next stage.

Before all others those go whose replica has failed: there they had a place already.

`Successors` lets one of them at a time look for a replica with room. Were all free to try, who comes just
when somebody is done would get the place, and one that is unlucky could wait for a minute while hundreds that
began after it go through, its activations held at every stage before. Whoever looks, and finds none, gives
the turn back when an older one comes: one whose replica has just failed, say.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

Place = tuple[bool, float]  # (no replica has failed with it, its deadline): the least goes first


class Turn:
    """What its holder has of it. `overtaken` is set once somebody waits who goes before."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.overtaken = asyncio.Event()


class Line:
    """Who holds the turn, and who waits for it."""

    def __init__(self) -> None:
        self._taken = False
        self._held: Turn | None = None
        self._waiting: list[tuple[Place, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def turn(self, deadline: float, *, again: bool = False) -> AsyncIterator[Turn]:
        """Hold the turn: of those who wait, whose deadline is the earliest gets it next; `again` before."""
        place = (not again, deadline)
        if self._taken:
            if self._held is not None and place < self._held.place:
                self._held.overtaken.set()
            await self._wait(place)
        self._taken = True
        self._held = Turn(place)
        if self._waiting and self._waiting[0][0] < place:  # it came while the turn was on its way here
            self._held.overtaken.set()
        try:
            yield self._held
        finally:
            self._held = None
            self._pass_on()

    async def _wait(self, place: Place) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (place, next(self._arrivals), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it came in the same moment
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return  # stays taken
        self._taken = False
