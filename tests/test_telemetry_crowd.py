"""A coordinator of 200 peers over an hour of virtual time: everything is seen, and nothing in it grows."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from view_crowd import ROUND_S, Crowd
from view_peers import TRAINER, World, clock
from view_world import replica

from shoal.node.view import intake, observer
from shoal.node.view.messages import METHOD, TelemetryHello, TelemetryTaken
from shoal.node.view.observer import Observer
from shoal.protocol import virtual_time
from shoal.protocol.identity import PeerId

PEERS, MINUTES = 200, 60


def kept(watcher: Observer) -> int:
    """Elements of all containers that the observer and its parts hold."""
    seen: set[int] = set()
    waiting: list[Any] = [watcher]
    count = 0
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, dict):
            count += len(found)
            waiting += found.values()
        elif isinstance(found, list | tuple | set | frozenset | deque):
            count += len(found)
            waiting += found
        elif type(found).__module__.startswith("shoal.node.view"):
            slots = [name for cls in type(found).__mro__ for name in getattr(cls, "__slots__", ())]
            waiting += [getattr(found, name) for name in slots if hasattr(found, name)]
            waiting += list(getattr(found, "__dict__", {}).values())
    return count


async def tell(world: World, crowd: Crowd, name: str, owner: PeerId, rng: random.Random) -> None:
    """One of the crowd, each at its own moment."""
    transport = world.network.transport(PeerId(name), TRAINER)
    await transport.start()
    await asyncio.sleep(rng.uniform(0.0, ROUND_S))
    async with transport.open(owner, METHOD) as stream:
        await stream.send(TelemetryHello(1))
        await stream.receive(TelemetryTaken)
        for height in range(1, MINUTES):
            crowd.now = clock()
            crowd.happens(name, height)
            world.members[name] = replica(name, crowd.stage(name), height=height)
            await stream.send(crowd.batch(name, height * ROUND_S))
            await stream.receive(TelemetryTaken)
            await asyncio.sleep(ROUND_S)


def test_an_hour_of_two_hundred_peers_is_seen_whole_and_memory_stays_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "SILENCE_S", 2.0 * ROUND_S)  # peers talk every 5 s; these once a round
    monkeypatch.setattr(observer, "SAMPLE_S", 1.0 * ROUND_S)

    async def scene() -> None:
        world, crowd, rng = World(1, stages=4), Crowd(PEERS, 4, seed=1), random.Random(1)
        owner = await world.add("owner", owner=True, folder=tmp_path)
        tasks = [asyncio.create_task(tell(world, crowd, name, owner.peer, rng)) for name in crowd.names]
        sizes = []
        for minute in range(1, MINUTES + 1):
            await asyncio.sleep(ROUND_S)
            if minute in (35, 45, 58):
                sizes.append(kept(owner.observer))
        seen = owner.observer.snapshot()
        print("kept", sizes)
        assert seen.coordinator.events_refused == 0
        assert len(seen.peers) == PEERS + 1
        assert all(peer.tokens for peer in seen.peers if peer.peer != "owner")
        assert len(seen.loss) == MINUTES - 1
        assert max(sizes) <= 1.05 * min(sizes), "as much after 58 minutes as after 35"
        found = await owner.observer.ask_history(
            {"what": "events", "kind": "round", "newest": True, "most": 1}
        )
        assert isinstance(found, dict) and found["events"][0]["fields"]["height"] == MINUTES - 1
        await asyncio.gather(*tasks)
        await world.close()

    virtual_time.run(scene)
