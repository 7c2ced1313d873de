"""Unbroken: what must not be left half done when whoever awaits it is cancelled.

A thread cannot be stopped: a caller that went away would leave it writing beside whatever comes next. Here
the caller stays until the end, as the owner of its work, and is cancelled then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

T = TypeVar("T")
Offload = Callable[..., Awaitable[Any]]


async def unbroken(work: Awaitable[T]) -> T:
    """What `work` gives. Cancelled meanwhile, the caller waits for its end first, whatever that is."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # nobody is left who would hear of it
    raise cancelled


def uncut(offload: Offload) -> Offload:
    """`offload` whose every call is unbroken."""

    async def call(function: Callable[..., Any], *arguments: object) -> Any:
        return await unbroken(offload(function, *arguments))

    return call
