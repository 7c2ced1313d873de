"""What checks of answers found, told: in words to whoever asked, and to the run's owners as telemetry."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable

from shoal.dht.view import SwarmView
from shoal.node.presence import Presence
from shoal.node.version import VERSION
from shoal.node.view.buffer import Buffer
from shoal.node.view.figures import audits_of
from shoal.node.view.messages import TelemetryFigures
from shoal.node.view.push import Push
from shoal.protocol.identity import PeerId
from shoal.training.serving.audit import Disagreement

DISAGREE = "answers-disagree"  # kind of event


def in_words(found: Disagreement, view: SwarmView, where: str = "") -> dict[str, object]:
    """The event's fields. `where`: what the text was written for."""

    def name(peer: PeerId) -> str:
        member = view.get(peer)
        return member.name if member is not None else "somebody"

    one, other = (" → ".join(map(name, chain)) for chain in (found.servers, found.checked_by))
    what = "a token" if found.said != found.recomputed else "hidden states"
    text = f"two chains disagree on {what}{where}: {one}, and {other} recomputed it"
    if found.stage is not None:
        text += f"; stage {found.stage} differs first, of {' and '.join(map(name, found.suspects))}"
    return {"text": text, "position": found.position}


@contextlib.asynccontextmanager
async def telling_owners(presence: Presence, counts: Callable[[], dict[str, int]]) -> AsyncIterator[Buffer]:
    """For a peer that only asks: pushes `counts`, and what the buffer gets, while the context lasts."""
    buffer, loop = Buffer(), asyncio.get_running_loop()
    begun_s = loop.time()

    def figures() -> TelemetryFigures:
        return TelemetryFigures(uptime_s=loop.time() - begun_s, version=VERSION, audits=audits_of(counts()))

    rng = random.Random(presence.rng.getrandbits(64))
    push = Push(presence.transport, presence.members, buffer, figures, presence.incarnation, rng)
    task = asyncio.create_task(push.run(), name="tell the owners")
    try:
        yield buffer
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
