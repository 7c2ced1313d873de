"""A peer's stages, one after another: what it leaves takes no memory beside what it begins."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_world import round_spec

from shoal.compression import kernels
from shoal.dht.view import SwarmView
from shoal.node import hardware
from shoal.node.trainee import Trainee
from shoal.node.worker import Worker
from shoal.protocol.errors import HardwareTooSmall, StageEmpty
from shoal.protocol.identity import PeerId
from shoal.training.tenure import Tenure


class Replica:
    """A ring, as trainers are: their hops, jobs and books know each other."""

    def __init__(self) -> None:
        self.ring = self

    async def recover(self) -> None:
        pass

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def drain(self, deadline_s: float) -> None:
        await asyncio.sleep(0.0)

    def status(self) -> dict[str, object]:
        return {"inner_steps": 1}

    def ledger(self) -> dict[str, list[tuple[int, int]]]:
        return {"driver/1": [(0, 7)]}


class Bench:
    def take(self) -> None:
        pass

    async def release(self) -> None:
        pass


def worker(folder: Path, stages_most: int = 1) -> Any:
    """One that says and computes nothing."""
    transport = SimpleNamespace(methods=frozenset(), withdraw=lambda _: None)
    presence: Any = SimpleNamespace(incarnation=1, transport=transport)
    options: Any = SimpleNamespace(decisions=None, stage=None, stages_most=stages_most)
    peer: Any = Worker(presence, options, folder, folder, lambda *_: None, None)
    peer._tell_plan, peer._bench = lambda *_: None, Bench()
    return peer


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
        peer, device = worker(tmp_path), hardware.Device("cpu", "a processor", 1 << 40)
        for stage in (0, 1, 0, 1):
            async with peer._begin(round_spec(2), stage, device, None) as trainee:
                await trainee.recover()
        assert peer.trainee.status() == {"inner_steps": 1}, "what the farewell tells"
        assert peer.trainee.ledger() == {"driver/1": [(0, 7)]}, "who asks while it closes counts on it"
        assert peer.done()["inner_steps"] == 4, "of all stages that it has had"

    asyncio.run(main())
    gc.unfreeze()
    assert beside == [0, 0, 0, 0]


def test_a_stage_that_is_given_back_leaves_the_memory_to_those_that_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[weakref.ref[Replica]] = []

    async def make(_: Trainee) -> Replica:
        replica = Replica()
        made.append(weakref.ref(replica))
        return replica

    monkeypatch.setattr(Trainee, "_made", make)

    async def main() -> None:
        peer, device = worker(tmp_path, stages_most=2), hardware.Device("cpu", "a processor", 1 << 40)
        tenure = Tenure(
            round_spec(2),
            view=lambda: SwarmView(PeerId("me"), 0.0, ()),
            begin=lambda stage: peer._begin(round_spec(2), stage, device, None),
            announce=lambda _: None,
            prefetch=lambda *_: asyncio.sleep(0.0),
            fits=lambda _: False,
            event=lambda *_: None,
            rng=random.Random(1),
            most=2,
        )
        async with asyncio.TaskGroup() as tasks:
            for stage in (0, 1):
                await (await tenure._open(stage, tasks)).decided.wait()
            await tenure._close(tenure._held[1])
            assert [one() is None for one in made] == [False, True]
            await tenure._close(tenure._held[0])

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.parametrize(
    "why",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        ExceptionGroup(
            "of a download", [StageEmpty("no donor"), torch.OutOfMemoryError("CUDA out of memory")]
        ),
    ],
    ids=["cuda", "cpu", "python", "in a group"],
)
def test_an_allocation_that_fails_while_a_stage_begins_is_hardware_that_is_too_small(
    why: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As whatever else ended the whole peer, with the stages that it had."""

    async def make(_: Trainee) -> Replica:
        raise why

    monkeypatch.setattr(Trainee, "_made", make)

    async def main() -> None:
        peer, device = worker(tmp_path), hardware.Device("cpu", "a processor", 1 << 40)
        async with peer._begin(round_spec(2), 1, device, None) as trainee:
            with pytest.raises(HardwareTooSmall, match="no memory for stage 1"):
                await trainee.recover()

    try:
        asyncio.run(main())
    finally:
        gc.unfreeze()


def test_other_errors_while_a_stage_begins_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), hardware.within_memory("stage 1"):
        raise RuntimeError("shapes do not fit")
