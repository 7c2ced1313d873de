"""A p2pd that does not end when it is told to is killed, whoever waits for it and in whatever state."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from shoal.dht.daemon import CLOSE_S, _dispose
from shoal.protocol.virtual_time import run


class Hung:
    """A p2pd that ends only when it is killed, or not even then."""

    def __init__(self, dies: bool = True) -> None:
        self.killed = False
        self.forgot = False
        self._dies = dies
        self._ended = asyncio.Event()

    def kill(self) -> None:
        self.killed = True
        if self._dies:
            self._ended.set()

    async def shutdown(self) -> None:
        await self._ended.wait()

    def forget_errors(self) -> None:
        self.forgot = True


@pytest.mark.parametrize("dies", [True, False])
def test_a_task_that_is_being_cancelled_kills_it_too(dies: bool) -> None:
    """What was: asyncio.timeout of CPython 3.11.2 (Debian 12) raises CancelledError in such a task, not
    TimeoutError, and p2pd stayed."""

    async def main() -> None:
        p2p: Any = Hung(dies)

        async def launch() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                await _dispose(p2p)

        launching = asyncio.create_task(launch())
        await asyncio.sleep(0.1)
        launching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            async with asyncio.timeout(3 * CLOSE_S):
                await asyncio.wait({launching})
        assert launching.done()
        assert launching.cancelled()
        assert p2p.killed
        assert p2p.forgot

    run(main)


def test_who_is_cancelled_while_it_ends_kills_it_at_once() -> None:
    async def main() -> None:
        p2p: Any = Hung()
        closing = asyncio.create_task(_dispose(p2p))
        await asyncio.sleep(0.1)
        closing.cancel()
        await asyncio.wait({closing})
        assert p2p.killed

    run(main)
