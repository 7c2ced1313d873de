"""Trying several addresses of a peer: the next one starts when the last has failed or is slow.

Knows nothing of gRPC. The idea of RFC 8305 (happy eyeballs): a dead address costs a fraction of a second.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from shoal.protocol.errors import NetworkError

T = TypeVar("T")
_STAGGER_S = 0.25  # RFC 8305, section 5
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):[0-9]{1,5}")


def is_address(text: str) -> bool:
    """Whether this is "host:port"; others choose it, so it must not be able to name anything else."""
    return _ADDRESS.fullmatch(text) is not None


async def first_answer(
    addresses: Sequence[str],
    attempt: Callable[[str], Awaitable[T]],
    discard: Callable[[T], Awaitable[None]],
    reasons: dict[str, str],
) -> T | None:
    """The result of the first address whose `attempt` succeeds, or None.

    A NetworkError of an attempt goes to `reasons` under its address; other exceptions end everything.
    Attempts that are not needed any more are cancelled, late results go to `discard`.
    Deadlines are the caller's.
    """
    waiting = list(dict.fromkeys(addresses))
    tasks: dict[asyncio.Task[T], str] = {}

    async def one(address: str) -> T:
        return await attempt(address)

    try:
        while waiting or tasks:
            if waiting:
                address = waiting.pop(0)
                tasks[asyncio.create_task(one(address), name=f"dial {address}")] = address
            await asyncio.wait(
                tasks, timeout=_STAGGER_S if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in [task for task in tasks if task.done()]:
                address = tasks.pop(task)
                try:
                    return task.result()
                except NetworkError as error:
                    reasons[address] = str(error)
        return None
    finally:
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, BaseException):
                await discard(result)
