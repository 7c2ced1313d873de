"""What all replicas of one peer work on: a lane for the device, pools for work beside it and for the disk.

Whatever a peer holds, its device does one thing at a time, backward before forward over all its stages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

from shoal.training.lane import ThreadLane
from shoal.training.work import paced

_OFFLOAD_THREADS = 2  # codecs and hashing beside the lane; more would only contend with it
_DISK_THREADS = 4  # own state, checkpoint, copies of other stages: a slow disk must not hold up the codecs
_SERVED = 16  # of a paced micro-batch: a batch of inference takes a sixteenth of it
T = TypeVar("T")


class Bench:
    """Use as `async with`; while nobody holds a stage it has no lane."""

    def __init__(self, pace_s: float, inference_share: float) -> None:
        """A micro-batch takes at least `pace_s` of the lane, inference its share."""
        self._pace_s = pace_s
        self._inference_share = inference_share
        self._lane: ThreadLane | None = None
        self._users = 0

    async def __aenter__(self) -> Self:
        self._pool = ThreadPoolExecutor(_OFFLOAD_THREADS, thread_name_prefix="offload")
        self._disk = ThreadPoolExecutor(_DISK_THREADS, thread_name_prefix="disk")
        return self

    async def __aexit__(self, *_: object) -> None:
        for pool in (self._pool, self._disk):
            await asyncio.to_thread(pool.shutdown, True, cancel_futures=True)

    def take(self) -> ThreadLane:
        """The lane; a new one, with nothing measured, for a peer that holds nothing else."""
        self._users += 1
        if self._lane is None:
            least_s = paced(self._pace_s, self._pace_s / _SERVED)
            self._lane = ThreadLane(least_s=least_s, share=self._inference_share)
        return self._lane

    async def release(self) -> None:
        """One who took it needs it no more."""
        self._users -= 1
        if not self._users and self._lane is not None:
            lane, self._lane = self._lane, None
            await lane.close()

    async def offload(self, function: Callable[..., T], *arguments: object) -> T:
        """Work off the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def disk(self, function: Callable[..., T], *arguments: object) -> T:
        """Large writes off the loop."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, function, *arguments)
