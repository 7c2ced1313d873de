"""Change: wakes whoever waits for a condition on state that lives on this loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Change:
    """A condition variable for one event loop: no lock, because nothing runs between two awaits."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[None], bool] = {}  # in order of arrival; whether notified
        self._conditions: dict[_Condition, None] = {}
        self._looking = False

    def notify(self) -> None:
        """Something changed: every waiter looks again, once for all that changes in this turn of the loop."""
        for future in self._waiting:
            self._waiting[future] = True  # also one that timed out in this turn, and has yet to wake
            _settle(future)
        if self._conditions and not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look)

    async def wait(self, until_s: float | None = None) -> bool:
        """Returns True after the next `notify`, False at the loop time `until_s`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting[future] = False
        timer = loop.call_at(until_s, _settle, future) if until_s is not None else None
        try:
            await future
            return self._waiting[future]
        finally:
            del self._waiting[future]
            if timer is not None:
                timer.cancel()

    async def until(self, holds: Callable[[], bool], until_s: Callable[[], float | None]) -> bool:
        """Wait until `holds()`, or the loop time `until_s()`, looked up anew after each change.

        Both are called by the loop itself: the waiting task is woken for nothing else.
        """
        while not holds():
            condition = _Condition(holds, until_s)
            self._conditions[condition] = None
            try:
                condition.arm()
                if not await condition.met:
                    return False
            finally:
                del self._conditions[condition]
                condition.close()
        return True

    def _look(self) -> None:
        self._looking = False
        for condition in list(self._conditions):
            condition.look()


class _Condition:
    """One wait in `until`: `met` says whether it held, or the time was over."""

    def __init__(self, holds: Callable[[], bool], until_s: Callable[[], float | None]) -> None:
        self._loop = asyncio.get_running_loop()
        self.met: asyncio.Future[bool] = self._loop.create_future()
        self._holds = holds
        self._until_s = until_s
        self._timer: asyncio.TimerHandle | None = None

    def look(self) -> None:
        if self.met.done():
            return
        try:
            if self._holds():
                self.met.set_result(True)
            else:
                self.arm()
        except Exception as error:  # is raised where it is waited for
            self.met.set_exception(error)

    def arm(self) -> None:
        """What does not hold now may hold before the time is over."""
        limit_s = self._until_s()
        if self._timer is not None and self._timer.when() == limit_s:
            return
        self.close()
        if limit_s is None:
            return
        if self._loop.time() >= limit_s:
            self.met.set_result(False)
        else:
            self._timer = self._loop.call_at(limit_s, self._due)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> None:
        self._timer = None
        self.look()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
