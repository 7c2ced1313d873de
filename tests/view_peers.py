"""Observers on memory links under a virtual clock: owners that gather, and peers that tell them."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from view_world import NOW, a_spec, own, replica

from shoal.dht.view import Member, SwarmView
from shoal.node.view.archive import Archive
from shoal.node.view.buffer import Buffer
from shoal.node.view.history import History
from shoal.node.view.observer import Observer
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import Link, MemoryNetwork

OWNER = frozenset({Role.OWNER, Role.TRAINER})
TRAINER = frozenset({Role.TRAINER})


def clock() -> float:
    return NOW + asyncio.get_running_loop().time()


async def inline(function: Callable[..., Any], *arguments: object) -> Any:
    return function(*arguments)


class Listed:
    """The part of `Members` that observers ask, with a list that the test keeps."""

    def __init__(self, me: PeerId, world: World) -> None:
        self.me = me
        self._world = world

    def view(self) -> SwarmView:
        members = sorted(self._world.members.values(), key=lambda member: member.peer)
        return SwarmView(self.me, asyncio.get_running_loop().time(), tuple(members))


class Watcher:
    """One peer: its transport, what happens at it, and its observer."""

    def __init__(self, world: World, name: str, *, owner: bool, folder: Path | None, process: int) -> None:
        self.peer = PeerId(name)
        self.buffer = Buffer(owner=owner, clock=clock)
        self.uptime_s = 0.0
        self.transport = world.network.transport(self.peer, OWNER if owner else TRAINER)
        archive = Archive(folder / "history.sqlite") if folder else None
        self.observer = Observer(
            transport=self.transport,
            members=Listed(self.peer, world),  # type: ignore[arg-type]
            buffer=self.buffer,
            own=self._own,
            spec=lambda: world.spec,
            standing=lambda: world.standing,
            process=process,
            clock=clock,
            rng=random.Random(f"{world.seed} {name} {process}"),
            history=History(archive, inline, clock) if archive else None,
            takes=owner,
        )
        self.training: dict[str, object] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.transport.start()
        self._task = asyncio.create_task(self.observer.run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.transport.close()

    def _own(self) -> Any:
        now_s = asyncio.get_running_loop().time()
        return dataclasses.replace(
            own(self.peer, f"name of {self.peer}"), uptime_s=now_s, training=self.training
        )


class World:
    """Peers by name. Everybody sees who is in `members`."""

    def __init__(self, seed: int, stages: int = 2) -> None:
        print("seed", seed)
        self.seed = seed
        self.spec = a_spec(stages)
        self.stages = stages
        self.standing = "running"
        self.network = MemoryNetwork(seed, Link(latency_s=0.02))
        self.members: dict[str, Member] = {}
        self.watchers: dict[str, Watcher] = {}
        self._processes = 0

    async def add(self, name: str, *, owner: bool = False, folder: Path | None = None) -> Watcher:
        """Start a peer; an owner with a folder keeps a history there."""
        self._processes += 1
        watcher = Watcher(self, name, owner=owner, folder=folder, process=self._processes)
        member = replica(name, len(self.watchers) % self.stages)
        roles = OWNER if owner else TRAINER
        self.members[name] = dataclasses.replace(member, roles=roles)
        self.watchers[name] = watcher
        await watcher.start()
        return watcher

    async def remove(self, name: str) -> None:
        """It goes away at once."""
        del self.members[name]
        watcher = self.watchers.pop(name)
        await watcher.stop()
        self.network.kill(watcher.peer)

    async def close(self) -> None:
        for name in list(self.watchers):
            await self.remove(name)


def training(**changed: object) -> dict[str, object]:
    """A trainer's own report, as `Trainer.status` makes it."""
    return {
        "stage": 0,
        "tokens": 4096,
        "micro_batches": 10,
        "duplicates_refused": 0,
        "dropped": 1,
        "retries": 2,
        "adopted": 1,
        "hedges": 0,
        "inner_steps": 5,
        "tokens_per_s": 100.0,
        "lane_busy_s": 1.0,
        "lane_finished": 10,
        "learning_rate": 1e-3,
        "next_stage": [],
        "outer": {"rounds": 3, "failed": 0, "repaired_parts": 0, "refused": {}},
        "checkpoint": {},
        "sessions": {},
        **changed,
    }


def round_told(height: int, stage: int = 0, **changed: object) -> dict[str, object]:
    """A `round` event's fields."""
    return {
        "height": height,
        "stage": stage,
        "seconds": 1.5,
        "contributors": 2,
        "skipped": 0,
        "codecs": ["int8", "int8"],
        "bytes_out": 1_000_000,
        "tokens": 40_960,
        "log_tokens": 40_960 * height,
        "loss": 3.0,
        "leader": "a",
        "phases": {
            "inner": {"start_s": -10.0, "s": 10.0},
            "prepare": {"start_s": 0.0, "s": 0.25},
            "send": {"start_s": 0.5, "s": 0.5},
            "apply": {"start_s": 1.25, "s": 0.25},
        },
        "bits_per_value": 8.5,
        "update_norm": 2.0,
        "residual_norm": 0.0,
        **changed,
    }
