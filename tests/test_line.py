"""Of those who wait for room at the next stage the oldest goes first, whoever gives up."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pipeline_world import small_spec

from shoal.protocol import virtual_time
from shoal.protocol.errors import Busy
from shoal.protocol.identity import PeerId
from shoal.training.lane import InlineLane
from shoal.training.pipeline.line import Line
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.pipeline.replicas import Replica, Replicas
from shoal.training.pipeline.successors import Successors

ONE = PeerId("one")


class OneReplica:
    """All there is of the next stage."""

    def of_stage(self, stage: int) -> Sequence[Replica]:
        return [Replica(ONE, 0.001, service_s=0.1)]

    async def changed(self) -> None:
        await asyncio.Event().wait()


def test_the_oldest_gets_the_turn_next_and_who_gives_up_holds_up_nobody() -> None:
    async def main() -> None:
        line, served = Line(), list[float]()

        async def stand(deadline: float) -> None:
            async with line.turn(deadline):
                served.append(deadline)
                await asyncio.sleep(1.0)

        async with line.turn(6.0):
            standing = {at: asyncio.create_task(stand(at)) for at in (5.0, 3.0, 4.0, 1.0, 2.0)}
            await asyncio.sleep(0)
            standing[1.0].cancel()  # while it waits
            await asyncio.wait([standing[1.0]])
        standing[2.0].cancel()  # just when it gets the turn
        await asyncio.sleep(0.5)
        standing[3.0].cancel()  # while it holds it
        await asyncio.gather(*standing.values(), return_exceptions=True)
        assert served == [3.0, 4.0, 5.0]
        async with asyncio.timeout(0.0), line.turn(7.0):  # nobody holds it any more
            pass

    virtual_time.run(main)


def test_what_a_replica_failed_with_goes_before_what_is_older() -> None:
    async def main() -> None:
        line, served = Line(), list[tuple[float, bool]]()

        async def stand(deadline: float, again: bool) -> None:
            async with line.turn(deadline, again=again):
                served.append((deadline, again))

        async with line.turn(1.0) as held:
            standing = [asyncio.create_task(stand(2.0, False)), asyncio.create_task(stand(4.0, True))]
            await asyncio.sleep(0)
            assert held.overtaken.is_set()
            standing.append(asyncio.create_task(stand(3.0, True)))
            await asyncio.sleep(0)
        await asyncio.gather(*standing)
        assert served == [(3.0, True), (4.0, True), (2.0, False)]

    virtual_time.run(main)


def test_a_turn_that_fails_is_passed_on() -> None:
    async def main() -> None:
        line = Line()
        with pytest.raises(KeyError):
            async with line.turn(1.0):
                raise KeyError
        async with asyncio.timeout(0.0), line.turn(2.0):
            pass

    virtual_time.run(main)


def test_who_waits_for_room_gives_the_turn_to_an_older_one_that_comes() -> None:
    """A micro-batch whose replica has died, say. It had to wait until all those had found room that stood at
    the head of the line before, one after another."""

    async def main() -> None:
        successors = Successors(
            1,
            cast(Replicas, OneReplica()),
            PayloadFormat.of(small_spec(2)),
            InlineLane(),
            random.Random(1),
            lambda kind, data: None,
        )
        asked: list[float] = []

        async def ask(deadline: float) -> None:
            await successors.room(2, deadline)
            asked.append(deadline)

        await ask(50.0)
        attempt: Any = SimpleNamespace(peer=ONE)
        successors.failed(attempt, Busy("full", retry_after_s=4.0))
        waiting = []
        for deadline in (60.0, 55.0, 40.0, 45.0):
            waiting.append(asyncio.create_task(ask(deadline)))
            await asyncio.sleep(0.1)
        waiting[2].cancel()  # while it has the turn
        await asyncio.gather(*waiting, return_exceptions=True)
        assert asked == [50.0, 45.0, 55.0, 60.0]

    virtual_time.run(main)
