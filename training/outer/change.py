"""Change: wakes whoever waits for a condition on state that lives on this loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Change:
    """A condition variable for one event loop: no lock, because nothing runs between two awaits."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.Future[bool], None] = {}  # in order of arrival

    def notify(self) -> None:
        """Something changed: every waiter looks again."""
        for future in self._waiting:
            _settle(future, True)

    async def wait(self, until_s: float | None = None) -> bool:
        """Returns True after the next `notify`, False at the loop time `until_s`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        self._waiting[future] = None
        timer = loop.call_at(until_s, _settle, future, False) if until_s is not None else None
        try:
            return await future
        finally:
            self._waiting.pop(future, None)
            if timer is not None:
                timer.cancel()

    async def until(self, holds: Callable[[], bool], until_s: Callable[[], float | None]) -> bool:
        """Wait until `holds()`, or the loop time `until_s()`, looked up anew after each change."""
        loop = asyncio.get_running_loop()
        while not holds():
            limit_s = until_s()
            if limit_s is not None and loop.time() >= limit_s:
                return False
            await self.wait(limit_s)
        return True


def _settle(future: asyncio.Future[bool], outcome: bool) -> None:
    if not future.done():
        future.set_result(outcome)
