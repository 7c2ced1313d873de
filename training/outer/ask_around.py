"""Ask several peers for the same thing: the first good answer counts, and a silent one costs a moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from shoal.protocol.errors import ProtocolViolation, ShoalError
from shoal.protocol.identity import PeerId
from shoal.training.outer.context import Context

HURRY_S = 1.5  # a peer that has not answered by then gets company; it is slow, or it stands still
T = TypeVar("T")


async def ask_around(
    context: Context, peers: Sequence[PeerId], ask: Callable[[PeerId], Awaitable[T]]
) -> tuple[T | None, dict[PeerId, ShoalError]]:
    """As `first_good`; who answers against the protocol is refused."""
    return await first_good(peers, ask, context.refuse)


async def first_good(
    peers: Sequence[PeerId],
    ask: Callable[[PeerId], Awaitable[T]],
    refuse: Callable[[PeerId, str], None] = lambda peer, why: None,
) -> tuple[T | None, dict[PeerId, ShoalError]]:
    """The first answer, None if there is none, and why the others gave none; asked in their order.

    `refuse` hears who answers against the protocol. Asks that are still under way are ended.
    """
    failures: dict[PeerId, ShoalError] = {}
    asked: dict[asyncio.Future[T], PeerId] = {}
    waiting = list(peers)[::-1]
    try:
        while waiting or asked:
            if waiting:
                peer = waiting.pop()
                asked[asyncio.ensure_future(ask(peer))] = peer
            done, _ = await asyncio.wait(
                asked, timeout=HURRY_S if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                peer = asked.pop(task)
                try:
                    return task.result(), failures
                except ShoalError as error:
                    failures[peer] = error
                    if isinstance(error, ProtocolViolation):
                        refuse(peer, str(error))
        return None, failures
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def reasons(failures: dict[PeerId, ShoalError]) -> str:
    """For people: who said what."""
    return "; ".join(f"{peer}: {error}" for peer, error in list(failures.items())[:4]) or "nobody to ask"
