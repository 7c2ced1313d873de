"""Can others dial this peer? Ask one of them to try, and say the answer in words before work begins.

Method `dial_back`: the asked peer opens a stream of its own to the asker's method `here`, with the contact it
has learned, so the answer is about the same route, certificates included, that training will use.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocol.errors import ShoalError
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Stream, Transport, call
from shoal.protocol.wire import Text, wire_message

ROLES = frozenset(Role)
_DIAL_S = 4.0
_ASK_S = 6.0
_JUDGES = 3


@dataclass(frozen=True, slots=True)
class Reach:
    """A verdict with its evidence."""

    text: str
    reachable: bool | None  # None: nobody could be asked


@wire_message
@dataclass(frozen=True, slots=True)
class DialBack:
    """Please dial me."""


@wire_message
@dataclass(frozen=True, slots=True)
class Here:
    """Request and reply of the dial itself."""


@wire_message
@dataclass(frozen=True, slots=True)
class DialedBack:
    """Whether it worked, and why not."""

    reached: bool
    reason: Text


def serve_dial_back(transport: Transport) -> None:
    """Answer both methods; before the transport starts."""

    async def here(stream: Stream) -> None:
        await stream.receive(Here)
        await stream.send(Here())

    async def dial_back(stream: Stream) -> None:
        await stream.receive(DialBack)
        try:
            await say_hello(transport, stream.remote.peer)
        except ShoalError as error:
            await stream.send(DialedBack(False, str(error)[:256]))
        else:
            await stream.send(DialedBack(True, ""))

    transport.serve("here", here, ROLES)
    transport.serve("dial_back", dial_back, ROLES)


async def say_hello(transport: Transport, peer: PeerId) -> None:
    """Dial a peer, for the sake of it. Raises what keeps this peer from reaching that one."""
    await call(transport, peer, "here", Here(), Here, timeout_s=_DIAL_S)


async def find_reach(transport: Transport, others: Sequence[PeerId], rng: random.Random) -> Reach:
    """Ask up to three of `others` (one at least) at once; one success is enough."""
    judges = rng.sample(list(others), min(_JUDGES, len(others)))
    answers = await asyncio.gather(*(_ask(transport, judge) for judge in judges))
    if any(answer.reached for answer in answers):
        return Reach("others can dial this peer", True)
    reasons = "; ".join(sorted({answer.reason for answer in answers}))
    return Reach(
        f"others cannot dial this peer: {reasons}\nopen the port in your router, or set --announce", False
    )


async def _ask(transport: Transport, judge: PeerId) -> DialedBack:
    try:
        reply = await call(transport, judge, "dial_back", DialBack(), DialedBack, timeout_s=_ASK_S)
    except ShoalError as error:
        return DialedBack(False, str(error)[:256])
    answer: DialedBack = reply.header
    return answer
