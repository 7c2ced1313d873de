"""Fetching a published part by its digest from any holder: repair in a round, and replay when catching up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from shoal.protocol.errors import NotHere, ProtocolViolation, ShoalError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Channel, call
from shoal.training.outer.ask_around import ask_around, reasons
from shoal.training.outer.codecs import codecs_of
from shoal.training.outer.context import Context
from shoal.training.outer.entry import SKIP, Entry
from shoal.training.outer.messages import PartRequest, PublishedPart
from shoal.training.outer.reduce import Published, checked

PART_S = 30.0  # one part from one holder; a stalled transfer ends sooner
AT_A_TIME = 4  # parts of an entry


async def fetch_parts(
    context: Context,
    entry: Entry,
    held: dict[int, Published],
    holders: Sequence[PeerId],
    others: Sequence[PeerId] = (),
) -> dict[int, Published]:
    """All parts that the entry names: those held already, the rest as `fetch_part`. Raises NotHere."""
    found: dict[int, Published] = {}
    missing: list[int] = []
    for part in range(entry.parts):
        digest = entry.digest(part)
        if digest == SKIP:
            continue
        here = held.get(part)
        if here is not None and here.digest == digest:
            found[part] = here
        else:
            missing.append(part)
    missing.reverse()
    failures: list[ShoalError] = []

    async def work() -> None:
        while missing and not failures:
            part = missing.pop()
            try:
                found[part] = await fetch_part(context, entry, part, holders, others)
            except ShoalError as error:
                failures.append(error)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(AT_A_TIME, len(missing))):
            tasks.create_task(work())
    if failures:
        raise failures[0]
    return found


async def fetch_part(
    context: Context, entry: Entry, part: int, holders: Sequence[PeerId], others: Sequence[PeerId] = ()
) -> Published:
    """A part of an entry from the first of `holders`, then `others`, that gives it; each in random order.

    Raises NotHere.
    """
    digest, codec = entry.digest(part), codecs_of(entry, entry.parts).published(part)
    count = context.fragments[entry.fragment].parts[part].count

    async def ask(peer: PeerId) -> Published:
        await context.meet(peer, (context.me, entry.leader, peer))
        message = await call(
            context.transport,
            peer,
            context.method("part"),
            PartRequest(part, digest),
            PublishedPart,
            timeout_s=PART_S,
            max_payload_bytes=codec.encoded_bytes(count),
            channel=Channel.BULK,
        )
        published: Published = await context.offload(
            checked, codec, part, message.header.listed, message.payload, count
        )
        if published.digest != digest:
            raise ProtocolViolation(f"part {part}: other bytes than digest {digest.hex()[:8]} names")
        return published

    order = [peer for peers in (holders, others) for peer in context.rng.sample(peers, len(peers))]
    found, failures = await ask_around(context, order, ask)
    if found is None:
        raise NotHere(f"part {part} ({digest.hex()[:8]}) found nowhere: {reasons(failures)}")
    return found
