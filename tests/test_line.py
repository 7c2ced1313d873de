"""Of those who wait for room at the next stage the oldest goes first, whoever gives up."""

from __future__ import annotations

import asyncio

import pytest

from shoal.protocol import virtual_time
from shoal.training.pipeline.line import Line


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


def test_a_turn_that_fails_is_passed_on() -> None:
    async def main() -> None:
        line = Line()
        with pytest.raises(KeyError):
            async with line.turn(1.0):
                raise KeyError
        async with asyncio.timeout(0.0), line.turn(2.0):
            pass

    virtual_time.run(main)
