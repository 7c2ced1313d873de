"""What a worker of the fault tests sees of itself: where its tasks wait, and when it did not run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

LOOK_S = 0.1
STALL_S = 0.3  # of a loop that should have run: a good part of the silence that makes others act


async def tell_stalls(tell: Callable[[float], None]) -> None:
    """For ever: the seconds, whenever this process stood still or nearly, so that others may give it up."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + LOOK_S
        await asyncio.sleep(LOOK_S)
        if (late_s := loop.time() - due_s) > STALL_S:
            tell(late_s)


def waits_at(task: asyncio.Task[Any]) -> str:
    """Functions and lines, from a task's coroutine down to what it awaits; `get_stack` has the first only."""
    places: list[str] = []
    waiting: object = task.get_coro()
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "ag_frame", None)
        places.append(f"{frame.f_code.co_qualname}:{frame.f_lineno}" if frame else type(waiting).__name__)
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "ag_await", None)
    return " > ".join(places)
