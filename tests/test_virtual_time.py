"""The virtual clock: hours pass at once, in order, alike in every run; what would hang raises."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import pytest

from shoal.protocol.virtual_time import Deadlock, TimeLimit, run


def test_sleeping_for_days_takes_no_time_and_timers_fire_exactly_when_due() -> None:
    fired: list[tuple[float, str]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        fired.append((asyncio.get_running_loop().time(), name))

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            for name, seconds in (("late", 1e9), ("early", 0.1), ("middle", 86_400.0), ("at once", 0.0)):
                tasks.create_task(sleeper(name, seconds))

    run(main())
    assert fired == [(0.0, "at once"), (0.1, "early"), (86_400.0, "middle"), (1e9, "late")]


def test_the_clock_stands_still_while_there_is_work() -> None:
    async def main() -> float:
        for _ in range(1000):
            await asyncio.sleep(0)
        return asyncio.get_running_loop().time()

    assert run(main, start_s=5.0) == 5.0


def test_deadlines_work() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run(main) == 3.0


def test_timers_fire_however_far_the_clock_is() -> None:
    """A fixed clock resolution would vanish beside a large time, and the loop would spin."""

    async def main() -> None:
        for seconds in (1e-9, 1e9, 1e-7, 1e15, 1.0):
            await asyncio.sleep(seconds)

    run(main, start_s=1e6)


def test_a_deadlock_raises_and_says_who_waits_where() -> None:
    async def stuck() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(stuck(), name="the stuck one")

    with pytest.raises(Deadlock, match=r"the stuck one waits at .*test_virtual_time\.py"):
        run(main)


def test_a_simulation_that_never_ends_meets_its_limit() -> None:
    async def main() -> None:
        while True:
            await asyncio.sleep(1)

    with pytest.raises(TimeLimit, match="100 virtual seconds"):
        run(main, limit_s=100)


def test_threads_are_refused() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="no threads"):
            await asyncio.to_thread(time.time)

    run(main)


def test_a_thread_cannot_call_in() -> None:
    async def main() -> None:
        import threading

        loop = asyncio.get_running_loop()
        raised: list[RuntimeError] = []

        def intrude() -> None:
            try:
                loop.call_soon_threadsafe(lambda: None)
            except RuntimeError as error:
                raised.append(error)

        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        assert "random moment" in str(raised[0])

    run(main)


def test_errors_of_the_main_coroutine_come_out() -> None:
    async def main() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main)


_CANCELLING = """
import asyncio
from shoal.protocol.virtual_time import run

async def worker(n, trace):
    try:
        await asyncio.sleep(10)
    except asyncio.CancelledError:
        trace.append(n)
        raise

async def main():
    trace = []
    junk = [object() for _ in range({junk})]
    tasks = {{asyncio.create_task(worker(n, trace)) for n in range(50)}}
    await asyncio.sleep(1)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    print(trace)

run(main)
"""


def test_sets_of_tasks_iterate_alike_in_every_process() -> None:
    traces = {
        subprocess.run(
            [sys.executable, "-c", _CANCELLING.format(junk=junk)],
            env={**os.environ, "PYTHONHASHSEED": str(junk)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for junk in (1, 1000, 54_321)
    }
    assert len(traces) == 1
    assert len(traces.pop()) > 100
