"""What one member says in a round ends nobody's rounds, be it malformed or a lie (P3)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
from ballots_world import FIRST, leader, mute, offer_of, prepare
from outer_world import World

from shoal.protocol.errors import ShoalError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Stream
from shoal.protocol.virtual_time import run
from shoal.training.outer.context import GROUP_ROLES
from shoal.training.outer.entry import ENTRY_BYTES, Contributor, Entry, Seat, bitmap, parse
from shoal.training.outer.line import LEADER_SILENCE_S, lifeline
from shoal.training.outer.messages import Answer, Commit, Go, Gone, Prepare
from shoal.training.outer.policy import GroupMember

Forge = Callable[[Entry], tuple[Entry | None, Entry | None]]  # a draft and an entry, of the leader's offer


class Lying(World):
    """One more member, which holds nothing and answers what it likes."""

    def group(self, seen_by: PeerId) -> Sequence[GroupMember]:
        return [*super().group(seen_by), GroupMember(peer=FIRST, incarnation=1, uplink=1.0)]


def here(offer: Entry) -> Entry:
    """A draft that could be one."""
    return replace(offer, roster=tuple(replace(seat, present=True) for seat in offer.roster))


def decided(offer: Entry) -> Entry:
    """An entry by the log's rules, of parts that nobody has."""
    draft, me = here(offer), offer.seat_of(FIRST) or 0
    mine = Contributor(me, 0, 10**6, 100, 1.0, 1.0)
    parts = 5
    results = [(bytes([7]) * 32, bitmap({me}, len(draft.roster)))] * parts
    return replace(draft, contributors=(mine,)).finish(list(results), 0)


@pytest.mark.parametrize(
    "forge",
    [
        lambda offer: (replace(here(offer), fragment=200), None),
        lambda offer: (replace(here(offer), contribution="none such"), None),
        lambda offer: (replace(here(offer), stage=offer.stage, ballot=2**40), None),
        lambda offer: (offer, None),
        lambda offer: (None, replace(decided(offer), tokens=1)),
        lambda offer: (None, replace(decided(offer), published="none such")),
        lambda offer: (None, decided(offer)),
    ],
    ids=["fragment", "codec", "vain draft", "nobody present", "entry's tokens", "entry's codec", "no parts"],
)
def test_an_answer_with_a_draft_or_an_entry_that_cannot_be(forge: Forge) -> None:
    async def lie(stream: Stream) -> None:
        async with lifeline(stream, LEADER_SILENCE_S) as line:
            offer = parse(bytes((await line.receive(Prepare, max_payload_bytes=ENTRY_BYTES)).payload))
            draft, entry = (found.encode() if found else b"" for found in forge(offer))
            answer = Answer(offer.height - 1, 0, 0, 0, 0.0, (), 0, len(draft), len(entry))
            line.post(answer, draft + entry)
            while True:
                await line.receive(Go, Gone, Commit, max_payload_bytes=ENTRY_BYTES)

    async def main() -> None:
        async with Lying(4) as world:
            transport = await leader(world, FIRST)
            transport.serve("outer.0.round", lie, GROUP_ROLES)
            await world.rounds(6, each=3)
            assert world.equal()
            assert not any(node.task is None or node.task.done() for node in world.nodes)
            await transport.close()

    run(main)


@pytest.mark.parametrize(
    ("deadline_s", "row"),
    [
        (4.0, Contributor(0, 10**6, 10**6 + 1, 100, 1.0, 1.0)),
        (1e9, Contributor(0, 0, 1, 10**9, 1.0, 1.0)),
    ],
    ids=["a gap", "no deadline"],
)
def test_a_draft_that_cannot_become_an_entry_or_never_ends(deadline_s: float, row: Contributor) -> None:
    """Its leader hangs up, and the next ones find it with all the others."""

    async def main() -> None:
        async with Lying(4) as world:
            transport = await leader(world, FIRST)
            await world.rounds(2, each=3)
            seats = [Seat(node.name, 1, 1.0, present=True) for node in world.nodes]
            roster = tuple(sorted([*seats, Seat(FIRST, 1, 1.0, present=True)], key=lambda seat: seat.peer))
            offer = offer_of(FIRST, world.nodes[0], 1)
            mine = replace(row, seat=[seat.peer for seat in roster].index(FIRST))
            draft = replace(offer, roster=roster, contributors=(mine,))
            for node in world.nodes:
                async with transport.open(node.name, "outer.0.round") as stream:
                    await prepare(stream, FIRST, node, 1)
                    await stream.send(Go(deadline_s), draft.encode())
                    await asyncio.sleep(0.1)
                    with suppress(ShoalError):
                        await stream.end()
            transport.serve("outer.0.round", mute, GROUP_ROLES)
            await world.rounds(3, each=3)
            assert world.equal()
            await transport.close()

    run(main)
