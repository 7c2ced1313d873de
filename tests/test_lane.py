"""The compute lane: most urgent work first, nobody starves, and the real one agrees with its twin."""

from __future__ import annotations

import asyncio
import threading

import pytest

from shoal.protocol import virtual_time
from shoal.training.lane import InlineLane, Lane, ThreadLane, Work


async def in_order(lane: Lane, kinds: list[Work], hold: threading.Event | None = None) -> list[Work]:
    """Queue these kinds behind a running piece of work; the order in which they are served."""
    served: list[Work] = []
    first = asyncio.create_task(lane.run(Work.FORWARD, hold.wait if hold else lambda: None))
    await asyncio.sleep(0)
    others = [asyncio.create_task(lane.run(kind, served.append, kind)) for kind in kinds]
    await asyncio.sleep(0)
    if hold:
        hold.set()
    await asyncio.gather(first, *others)
    await lane.close()
    return served


QUEUED = [Work.SERVE, Work.WEIGHT, Work.FORWARD, Work.BACKWARD, Work.FORWARD, Work.UPDATE]
URGENT_FIRST = [Work.UPDATE, Work.BACKWARD, Work.FORWARD, Work.FORWARD, Work.WEIGHT, Work.SERVE]


def test_backward_goes_before_forward_and_weights_fill_the_gaps() -> None:
    async def real() -> list[Work]:
        return await in_order(ThreadLane(), QUEUED, threading.Event())

    async def twin() -> list[Work]:
        return await in_order(InlineLane(), QUEUED)

    assert asyncio.run(real()) == virtual_time.run(twin) == URGENT_FIRST


def test_weight_gradients_that_pile_up_go_before_forwards() -> None:
    async def twin() -> list[Work]:
        return await in_order(InlineLane(), [Work.FORWARD] * 3 + [Work.WEIGHT] * 3)

    assert virtual_time.run(twin)[:2] == [Work.WEIGHT, Work.WEIGHT]


def test_a_busy_lane_still_serves() -> None:
    async def twin() -> list[Work]:
        return await in_order(InlineLane(), [Work.SERVE] + [Work.FORWARD] * 40)

    assert virtual_time.run(twin).index(Work.SERVE) < 10


def test_errors_reach_the_caller_and_the_lane_goes_on() -> None:
    async def main() -> None:
        lane = ThreadLane()
        with pytest.raises(ZeroDivisionError):
            await lane.run(Work.FORWARD, lambda: 1 // 0)
        assert await lane.run(Work.FORWARD, lambda: 7) == 7
        assert lane.load().finished == 2
        await lane.close()

    asyncio.run(main())


def test_work_whose_caller_gave_up_is_not_done() -> None:
    async def main() -> None:
        lane = ThreadLane()
        hold = threading.Event()
        done: list[int] = []
        first = asyncio.create_task(lane.run(Work.FORWARD, hold.wait))
        await asyncio.sleep(0)
        second = asyncio.create_task(lane.run(Work.FORWARD, done.append, 1))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        hold.set()
        await first
        assert await lane.run(Work.SERVE, len, done) == 0
        await lane.close()

    asyncio.run(main())
