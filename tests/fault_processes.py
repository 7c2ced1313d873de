"""Real processes to break: mutual TLS on loopback, real membership. What they do is for others to say.

`fault_group` makes replicas of one stage of them, `pipeline_group` a pipeline. Everything a worker tells is
kept by its `Replica`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, Self, TypeVar

from fault_orders import LINE_BYTES, Order
from fault_replica import COMMAND_S, Nursery, Replica
from fault_story import story, waits

from shoal.protocol.admission import OwnerKey
from shoal.protocol.identity import Role
from shoal.training.spec import RunSpec

RUN = bytes(range(32))
R = TypeVar("R", bound=Replica)


class ProcessGroup(ABC, Generic[R]):
    """Some workers. Use as `async with`; they end with it."""

    def __init__(self, folder: Path, nursery: Nursery, numbers: Sequence[int], *, seed: int) -> None:
        """`numbers`: of the workers that are there from the beginning."""
        self.seed = seed
        self.lives: list[R] = []  # all there ever were
        self.folder = folder
        self._nursery = nursery
        self.numbers = numbers
        self._news = asyncio.Event()
        self._claims = itertools.count()
        self._listening: set[asyncio.Task[None]] = set()
        now = time.time()
        self.owner = OwnerKey.create(folder / "owner", RUN, "faults", now)
        self.token = self.owner.issue_token([Role.TRAINER], 86_400.0, (), "worker", now).encode()

    @abstractmethod
    def order(self, number: int, incarnation: int) -> Order:
        """What makes a worker."""

    def plain_order(self, number: int, incarnation: int, spec: RunSpec) -> Order:
        """What the orders of all workers have."""
        return Order(
            socket=str(self.folder / "socket"),
            errors=str(self.folder / f"w{number}.errors"),
            number=number,
            incarnation=incarnation,
            seed=self.seed,
            token=self.token,
            spec=spec.model_dump(mode="json"),
        )

    @abstractmethod
    def replica(self, number: int, incarnation: int) -> R:
        """The test's side of it."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(
            self._connected, self.folder / "socket", limit=LINE_BYTES
        )
        await self.start(*self.numbers)
        return self

    async def __aexit__(self, *_: object) -> None:
        for replica in self.lives:
            if not replica.ended and replica.pid:
                replica.signal(signal.SIGKILL)
        if self._listening:
            await asyncio.wait(self._listening)
        self._server.close()
        await self._server.wait_closed()

    # -- life and death

    async def start(self, *numbers: int, arming: str | None = None, **more: str) -> list[R]:
        """Start workers, each as its next incarnation; they have joined when this returns, and all have met.

        Raises ConnectionError for one that what was armed in it has killed.
        """
        newcomers = await self.enter(*numbers, arming=arming, **more)
        await self.meet()
        return newcomers

    async def enter(self, *numbers: int, arming: str | None = None, **more: str) -> list[R]:
        """The same, whoever else comes and goes meanwhile."""
        newcomers = [await self._fork(number) for number in numbers]
        await self.until(lambda: all(r.pid or r.ended for r in newcomers), "workers to start")
        if arming is not None:
            await self.arm(arming, *newcomers, **more)
        known = {replica: (await replica.ask("record"))["record"] for replica in self.awake()}
        joining = (
            replica.ask("join", records=[record for of, record in known.items() if of is not replica])
            for replica in newcomers
        )
        await asyncio.gather(*joining)
        return newcomers

    async def _fork(self, number: int) -> R:
        incarnation = 1 + sum(life.number == number for life in self.lives)
        replica = self.replica(number, incarnation)
        self.lives.append(replica)
        self._nursery.fork(self.order(number, incarnation))
        return replica

    async def meet(self) -> None:
        """Until all members that are awake see each other, and nobody else."""
        awake = self.awake()
        peers = [replica.peer for replica in awake]
        await asyncio.gather(*(r.ask("meet", peers=[p for p in peers if p != r.peer]) for r in awake))

    @property
    def members(self) -> list[R]:
        """Who lives."""
        return [replica for replica in self.lives if replica.pid and not replica.ended]

    def awake(self) -> list[R]:
        """Who lives and runs."""
        return [replica for replica in self.members if not replica.frozen]

    async def kill(self, replica: R) -> None:
        """SIGKILL; returns when it is gone."""
        replica.signal(signal.SIGKILL)
        await self.until(lambda: replica.ended, f"end of {replica}")

    async def arm(self, arming: str, *replicas: R, **more: str) -> None:
        """Arm a fault point in some processes; the first that passes it is struck, and no other."""
        claim = self.folder / f"claim-{next(self._claims)}"
        await asyncio.gather(
            *(r.ask("arm", arming=arming, once=str(claim), limit_s=COMMAND_S, **more) for r in replicas)
        )

    async def until(self, holds: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
        """Look at each piece of news. Raises AssertionError with everybody's story."""
        try:
            async with asyncio.timeout(limit_s):
                while not holds():
                    crashes = [f"{replica}: {replica.crash}" for replica in self.lives if replica.crash]
                    assert not crashes, f"{crashes}\n{self.story()}"
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            waiting = await waits(self.awake())
            raise AssertionError(f"no {what} within {limit_s:g} s\n{self.story()}\n{waiting}") from None

    def story(self) -> str:
        """For a failed test."""
        return story(self.lives, self.folder)

    # -- the line

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._listening.add(task)
            task.add_done_callback(self._listening.discard)
        first = json.loads(await reader.readline())
        replica = next(
            r for r in self.lives if (r.number, r.incarnation) == (first["number"], first["incarnation"])
        )
        await replica.listen(reader, writer, self._news.set)
        writer.close()
