"""A peer's stages, one after another: what it leaves takes no memory beside what it begins."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trainer_world import round_spec

from shoal.compression import kernels
from shoal.node import hardware
from shoal.node.trainee import Trainee
from shoal.node.worker import Worker


class Replica:
    """A ring, as trainers are: their hops, jobs and books know each other."""

    def __init__(self) -> None:
        self.ring = self

    async def recover(self) -> None:
        pass

    def status(self) -> dict[str, object]:
        return {"inner_steps": 1}


class Bench:
    def take(self) -> None:
        pass

    async def release(self) -> None:
        pass


def test_of_the_stages_that_a_peer_left_none_is_in_memory_when_it_begins_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Freezing what is there once codecs are compiled would keep a ring for good."""
    made: list[weakref.ref[Replica]] = []
    beside: list[int] = []  # earlier ones in memory when one is made

    async def make(_: Trainee) -> Replica:
        beside.append(sum(earlier() is not None for earlier in made))
        replica = Replica()
        made.append(weakref.ref(replica))
        return replica

    monkeypatch.setattr(Trainee, "_made", make)
    monkeypatch.setattr(hardware, "_COMPILED_FROM", 0)
    monkeypatch.setattr(kernels, "warm", lambda: None)

    async def main() -> None:
        transport = SimpleNamespace(methods=frozenset(), withdraw=lambda _: None)
        presence: Any = SimpleNamespace(incarnation=1, transport=transport)
        options: Any = SimpleNamespace(decisions=None, stage=None, stages_most=1)
        device = hardware.Device("cpu", "a processor", 1 << 40)
        peer: Any = Worker(presence, options, tmp_path, tmp_path, lambda *_: None)
        peer._tell_plan, peer._bench = lambda *_: None, Bench()
        for stage in (0, 1, 0, 1):
            async with peer._begin(round_spec(2), stage, device, None) as trainee:
                await trainee.recover()
        assert peer.trainee.status() == {"inner_steps": 1}, "what the farewell tells"
        assert peer.done()["inner_steps"] == 4, "of all stages that it has had"

    asyncio.run(main())
    gc.unfreeze()
    assert beside == [0, 0, 0, 0]
