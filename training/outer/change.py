"""Change: wakes whoever waits for a condition on state that lives on this loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

Again = Callable[[], float | None]


class Change:
    """A condition variable for one event loop: no lock, because nothing runs between two awaits."""

    def __init__(self) -> None:
        self._waiting: dict[_Waiting, None] = {}  # in order of arrival
        self._conditions: dict[_Condition, None] = {}
        self._looking = False

    def notify(self) -> None:
        """Something changed: every waiter looks again, once for all that changes in this turn of the loop."""
        for waiting in self._waiting:
            waiting.notified = True  # also one that timed out in this turn, and has yet to wake
            waiting.wake()
        if self._conditions and not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look)

    async def wait(self, until_s: float | None = None, again_s: Again = lambda: None) -> bool:
        """Returns True after the next `notify`, False at the loop time `until_s`.

        Unless `again_s()` names a later time then. The loop itself calls it: the waiting task is woken for
        nothing else.
        """
        waiting = _Waiting(until_s, again_s)
        self._waiting[waiting] = None
        try:
            await waiting.woken
            return waiting.notified
        finally:
            del self._waiting[waiting]
            waiting.close()

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


class _Waiting:
    """One call of `wait`."""

    def __init__(self, until_s: float | None, again_s: Again) -> None:
        self._loop = asyncio.get_running_loop()
        self.woken: asyncio.Future[None] = self._loop.create_future()
        self.notified = False
        self._again_s = again_s
        self._timer = self._loop.call_at(until_s, self._due) if until_s is not None else None

    def wake(self) -> None:
        if not self.woken.done():
            self.woken.set_result(None)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _due(self) -> None:
        self._timer = None
        if self.woken.done():
            return
        try:
            next_s = self._again_s()
        except Exception as error:  # is raised where it is waited for
            self.woken.set_exception(error)
            return
        if next_s is None:
            self.wake()
        else:
            self._timer = self._loop.call_at(next_s, self._due)


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
