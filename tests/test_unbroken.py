"""Unbroken: a caller that is cancelled, also twice, stays until what it began has ended."""

from __future__ import annotations

import asyncio

import pytest

from shoal.protocol import virtual_time
from shoal.protocol.unbroken import unbroken


async def piece(fails: bool = False) -> float:
    await asyncio.sleep(1.0)
    if fails:
        raise ValueError("it fails")
    return asyncio.get_running_loop().time()


def test_undisturbed_it_gives_what_the_work_gives() -> None:
    async def main() -> None:
        assert await unbroken(piece()) == asyncio.get_running_loop().time()
        with pytest.raises(ValueError, match="it fails"):
            await unbroken(piece(fails=True))

    virtual_time.run(main)


@pytest.mark.parametrize("fails", [False, True])
def test_cancelled_it_ends_with_the_work_and_as_cancelled(fails: bool) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        caller = asyncio.create_task(unbroken(piece(fails)))
        for _ in range(2):
            await asyncio.sleep(0.25)
            caller.cancel()
        await asyncio.wait([caller])
        assert caller.cancelled()
        assert loop.time() == begun_s + 1.0

    virtual_time.run(main)
