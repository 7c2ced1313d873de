"""Fetching entries: what a donor sends is bounded by what replicas keep, not by what somebody tells."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from ballots_world import FIRST, leader, offer_of
from outer_world import World, round_spec

from shoal.protocol.errors import PeerSilent
from shoal.protocol.transport import Channel, Stream
from shoal.protocol.virtual_time import run
from shoal.training.outer.context import GROUP_ROLES
from shoal.training.outer.entry import entry_hash
from shoal.training.outer.messages import EntriesRequest, EntryItem
from shoal.training.recovery import chain
from shoal.training.recovery.policy import Target


def test_a_donor_that_sends_entries_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "ENTRIES_BYTES", 4096)
    monkeypatch.setattr(chain, "ENTRY_BYTES", 4096)
    sent_bytes = 0

    async def main() -> None:
        async with World(1, round_spec(outer={"snapshot_every": 1})) as world:
            (node,) = world.nodes
            donor, outer = await leader(world, FIRST), node.outer
            first = offer_of(FIRST, node, 1)

            async def entries(stream: Stream) -> None:
                nonlocal sent_bytes
                request = (await stream.receive(EntriesRequest)).header
                previous = first.previous
                for height in range(request.from_height, request.to_height + 1):
                    data = replace(first, height=height, previous=previous).encode()
                    await stream.send(EntryItem(height), data)
                    previous, sent_bytes = entry_hash(data), sent_bytes + len(data)

            donor.serve(outer.context.method("entries"), entries, GROUP_ROLES, Channel.BULK)
            target = Target(100_000, bytes(32), bytes(32), (FIRST,))
            with pytest.raises(PeerSilent, match="more entries than a replica keeps"):
                await chain.fetch_chain(outer.context, 0, outer.head, target)
            assert outer.status()["refused"] == {FIRST: 1}

    run(main)
    assert sent_bytes < 1 << 20, "of some thirty times as many"


def test_a_donor_that_drips_entries_holds_nobody_up_for_long() -> None:
    """It claims a height that nobody has; each entry comes in time, and a member that waits takes no part."""

    async def main() -> None:
        async with World(1, round_spec()) as world:
            (node,) = world.nodes
            donor, outer = await leader(world, FIRST), node.outer
            first = offer_of(FIRST, node, 1)

            async def entries(stream: Stream) -> None:
                request = (await stream.receive(EntriesRequest)).header
                for height in range(request.from_height, request.to_height + 1):
                    await asyncio.sleep(1.5)
                    await stream.send(EntryItem(height), replace(first, height=height).encode())

            donor.serve(outer.context.method("entries"), entries, GROUP_ROLES, Channel.BULK)
            target = Target(100_000, bytes(32), bytes(32), (FIRST,))
            async with asyncio.timeout(60.0):
                with pytest.raises(PeerSilent, match="too slowly"):
                    await chain.fetch_chain(outer.context, 0, outer.head, target)

    run(main)
