"""Several devices in one peer: a child process for each beside the first, watched from start to end.

The first device is the daemon's own. A child reads on its standard input what it shall do (`rank_process`)
and ends when that ends. If one of them dies or falls silent the peer fails, by the name of the device:
its shards of the weights are gone, and the swarm has other replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from shoal.node import parent
from shoal.protocol.errors import DeviceLost
from shoal.training.devices.gang import Gang
from shoal.training.devices.ranks import ANSWER_S, Ranks, check_rows, join, part
from shoal.training.spec import RunSpec

_WORD_S = 1.0  # after a collective has failed, for the child whose fault it was to be known


class Children:
    """The other ranks' processes. Use as `async with`."""

    def __init__(self, devices: Sequence[str], answer_s: float = ANSWER_S) -> None:
        """Each with as many CPU threads as this process."""
        self._devices, self._answer_s = tuple(devices), answer_s
        self.processes: list[asyncio.subprocess.Process] = []
        self._pipes: list[int] = []
        loop = asyncio.get_running_loop()
        self._failure: asyncio.Future[DeviceLost] = loop.create_future()
        self._loop = loop

    async def __aenter__(self) -> Children:
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-")  # backends may meet again later
        meeting = Path(self._folder.name) / "ranks"
        async with contextlib.AsyncExitStack() as begun:
            begun.push_async_callback(self._end)
            for rank in range(1, len(self._devices)):
                await self._start(rank, meeting)
            ranks = await self._join(meeting)
            begun.pop_all()
        self.gang = Gang(ranks, self._pipes, self._lost)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()
        await asyncio.to_thread(part)

    async def watch(self) -> NoReturn:
        """Never returns. Raises DeviceLost as soon as a device fails."""
        ends = {asyncio.ensure_future(process.wait()): rank for rank, process in enumerate(self.processes, 1)}
        anything: set[asyncio.Future[Any]] = {*ends, self._failure}
        try:
            await asyncio.wait(anything, return_when=asyncio.FIRST_COMPLETED)
            if not any(end.done() for end in ends):
                await asyncio.wait(ends, timeout=_WORD_S, return_when=asyncio.FIRST_COMPLETED)
            gone = [self._words(rank, end.result()) for end, rank in ends.items() if end.done()]
            for process in self.processes:  # whoever waits for one of them waits no more
                _kill(process)
            raise DeviceLost("; ".join(gone)) if gone else self._failure.result()
        finally:
            for end in ends:
                end.cancel()

    def _words(self, rank: int, code: int) -> str:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"device {self._devices[rank]} (rank {rank}) of this peer ended with {how}"

    def _lost(self, failure: DeviceLost) -> None:
        def tell() -> None:
            if not self._failure.done():
                self._failure.set_result(failure)

        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(tell)

    async def _start(self, rank: int, meeting: Path) -> None:
        reading, writing = os.pipe()
        self._pipes.append(writing)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "shoal.node.rank_process",
                stdin=reading,
                stdout=asyncio.subprocess.DEVNULL,
                env={**os.environ, parent.ENVIRONMENT_KEY: str(os.getpid())},
                start_new_session=True,  # Ctrl-C in a terminal is for the daemon
            )
        finally:
            os.close(reading)
        self.processes.append(process)
        setting = {
            "rank": rank,
            "devices": self._devices,
            "meeting": str(meeting),
            "answer_s": self._answer_s,
            "threads": torch.get_num_threads(),
        }
        with contextlib.suppress(BrokenPipeError):  # it is dead already, and `watch` says how it ended
            os.write(writing, json.dumps(setting).encode() + b"\n")

    async def _join(self, meeting: Path) -> Ranks:
        """On a thread of its own, which nobody waits for if a child does not come."""
        joined: asyncio.Future[Ranks] = self._loop.create_future()

        def settle(ranks: Ranks | None, error: Exception | None) -> None:
            if joined.done():
                return
            if ranks is not None:
                joined.set_result(ranks)
            else:
                joined.set_exception(DeviceLost(f"the devices of this peer did not meet: {error}"))

        def work() -> None:
            try:
                ranks, error = join(0, self._devices, meeting, self._answer_s), None
            except Exception as failure:  # of whatever kind torch and its backends raise
                ranks, error = None, failure
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(settle, ranks, error)

        threading.Thread(target=work, name="join devices", daemon=True).start()
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self.watch())
            ranks = await joined
            watching.cancel()
        return ranks

    async def _end(self) -> None:
        for pipe in self._pipes:
            os.close(pipe)
        for process in self.processes:
            _kill(process)  # it keeps nothing that would have to be put in order
            await process.wait()
        self._folder.cleanup()


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


@contextlib.asynccontextmanager
async def several(spec: RunSpec, devices: Sequence[str]) -> AsyncIterator[Gang]:
    """The body is cancelled, and DeviceLost raised, when a device fails.

    Raises SpecError for devices that would have nothing to do.
    """
    check_rows(spec, len(devices))
    async with Children(devices) as children, asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(children.watch(), name="watch devices")
        yield children.gang
        watching.cancel()
