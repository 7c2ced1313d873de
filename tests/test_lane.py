"""The compute lane: most urgent work first, nobody starves, and the real one agrees with its twin."""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from shoal.protocol import virtual_time
from shoal.training.lane import InlineLane, Lane, ThreadLane
from shoal.training.work import Work, next_kind, weights_in_stock


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
        return await in_order(ThreadLane(share=0.0), QUEUED, threading.Event())

    async def twin() -> list[Work]:
        return await in_order(InlineLane(share=0.0), QUEUED)

    assert asyncio.run(real()) == virtual_time.run(twin) == URGENT_FIRST


def test_weight_gradients_that_pile_up_go_before_forwards() -> None:
    async def twin() -> list[Work]:
        return await in_order(InlineLane(), [Work.FORWARD] * 3 + [Work.WEIGHT] * 3)

    assert virtual_time.run(twin)[:2] == [Work.WEIGHT, Work.WEIGHT]


def test_a_driver_with_much_in_flight_has_a_stock_of_weight_gradients_for_gaps() -> None:
    assert [weights_in_stock(in_flight) for in_flight in (1, 4, 8, 128)] == [2, 2, 4, 12]
    waiting = [0, 0, 1, 11, 0]
    assert next_kind(waiting, weights_waiting=12) is Work.FORWARD
    assert next_kind([0, 0, 1, 12, 0], weights_waiting=12) is Work.WEIGHT
    assert next_kind([0, 1, 1, 12, 0], weights_waiting=12) is Work.BACKWARD


async def oldest_first(lane: Lane, hold: threading.Event | None = None) -> tuple[list[float], int]:
    """The order in which forwards are served that began to wait at other times; how many go before 2.0."""
    served: list[float] = []
    first = asyncio.create_task(lane.run(Work.BACKWARD, hold.wait if hold else lambda: None))
    await asyncio.sleep(0)
    others = [
        asyncio.create_task(lane.run(Work.FORWARD, served.append, since, since=since))
        for since in (3.0, 1.0, 2.0, 0.0, 1.0)
    ]
    await asyncio.sleep(0)
    others[3].cancel()  # withdrawn
    await asyncio.wait([others[3]])
    before = lane.load(before=2.0).queued
    if hold:
        hold.set()
    await asyncio.gather(first, *others, return_exceptions=True)
    await lane.close()
    return served, before


def test_of_a_kind_the_oldest_goes_first() -> None:
    async def real() -> tuple[list[float], int]:
        return await oldest_first(ThreadLane(share=0.0), threading.Event())

    async def twin() -> tuple[list[float], int]:
        return await oldest_first(InlineLane(share=0.0))

    assert asyncio.run(real())[0] == [1.0, 1.0, 2.0, 3.0]
    assert virtual_time.run(twin) == ([1.0, 1.0, 2.0, 3.0], 3)


async def busy_with_both(share: float, seconds: float, training: bool = True) -> dict[Work, float]:
    """Time that training and serving get of a lane which both would fill; pieces of serving differ."""
    rng, spent = random.Random(1), dict.fromkeys(Work, 0.0)
    duration_s = {kind: 0.02 for kind in Work}

    def draw(kind: Work) -> float:
        found = rng.uniform(0.001, 0.06) if kind is Work.SERVE else duration_s[kind]
        spent[kind] += found
        return found

    lane = InlineLane(draw, share)
    kinds = ([Work.BACKWARD, Work.FORWARD] if training else []) + [Work.SERVE] * 2

    async def caller(kind: Work) -> None:
        while True:
            await lane.run(kind, lambda: None)

    tasks = [asyncio.create_task(caller(kind)) for kind in kinds]
    await asyncio.sleep(seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return spent


@pytest.mark.parametrize("share", [0.05, 0.125, 0.3, 0.6])
def test_of_a_lane_that_trains_all_the_time_serving_takes_its_share(share: float) -> None:
    spent = virtual_time.run(lambda: busy_with_both(share, 100.0))
    assert abs(spent[Work.SERVE] / sum(spent.values()) - share) < 0.02


def test_without_a_share_a_busy_lane_only_trains_and_a_free_one_serves() -> None:
    assert virtual_time.run(lambda: busy_with_both(0.0, 20.0))[Work.SERVE] == 0.0
    assert virtual_time.run(lambda: busy_with_both(0.0, 20.0, training=False))[Work.SERVE] > 19.0


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


def test_a_lane_that_is_faster_now_says_so_before_its_weight_gradients_are_due() -> None:
    async def main() -> None:
        duration_s = 0.2
        lane = InlineLane(lambda kind: duration_s)
        for kind in [Work.FORWARD, Work.BACKWARD, Work.WEIGHT] * 5:
            await lane.run(kind, lambda: None)
        duration_s = 0.01
        for kind in [Work.FORWARD, Work.BACKWARD] * 3:
            await lane.run(kind, lambda: None)
        await asyncio.sleep(0.001)
        assert lane.load().service_s == pytest.approx(0.03)

    virtual_time.run(main)


@pytest.mark.parametrize("error", [asyncio.CancelledError, StopIteration, SystemExit])
def test_whatever_a_job_raises_the_lane_goes_on(error: type[BaseException]) -> None:
    def ends() -> None:
        raise error

    async def main() -> None:
        lane = ThreadLane()
        with pytest.raises(RuntimeError, match=error.__name__):
            await asyncio.wait_for(lane.run(Work.FORWARD, ends), 10.0)
        assert await asyncio.wait_for(lane.run(Work.FORWARD, lambda: 1), 10.0) == 1
        await lane.close()

    asyncio.run(main())
