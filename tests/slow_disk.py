"""A disk's thread in virtual time: what it has begun it ends, also when whoever waits for it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any


class SlowDisk:
    """`offload` takes the next of some durations for each call."""

    def __init__(self, seconds: Iterable[float]) -> None:
        self._seconds = iter(seconds)
        self._jobs: set[asyncio.Task[Any]] = set()

    async def offload(self, function: Callable[..., Any], *arguments: Any) -> Any:
        job = asyncio.create_task(self._job(next(self._seconds), function, arguments))
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return await asyncio.shield(job)

    async def still(self) -> None:
        """Until nothing is under way any more."""
        while self._jobs:
            await asyncio.wait(set(self._jobs))

    async def _job(self, seconds: float, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        await asyncio.sleep(seconds)
        return function(*arguments)
