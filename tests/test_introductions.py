"""Peers of a swarm known in part find out how to dial those they work with, and nobody gains by lying there.

On real sockets with mutual TLS, but for the rounds: there a transport in memory lets nobody dial whom it has
not met. Directories tell of a swarm of 1,200, and show nobody, so that three peers are strangers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from members_process import peer
from outer_world import World
from transport_world import Run, play_run

from shoal.dht import introductions
from shoal.dht.directory import PeerRecord, SignedRecord
from shoal.dht.interest import Known
from shoal.dht.introductions import METHOD, Introduce, Introduced
from shoal.dht.members import Members
from shoal.dht.records import SIGNATURE_LABEL
from shoal.dht.view import SwarmView
from shoal.protocol.errors import Busy, NotHere, PeerUnreachable, RecordInvalid
from shoal.protocol.identity import PeerId, PeerKey, Role
from shoal.protocol.transport import Channel, Stream, Transport, call
from shoal.protocol.virtual_time import run
from shoal.protocol.wire import decode, encode
from shoal.training.outer.context import Meet

SIZES = {0: 400.0, 1: 400.0, 2: 400.0}
NEAR_ONLY = Known(near=400, anybody=0, everybody=3)  # all of the own stage, the next and the previous one


@asynccontextmanager
async def a_chain(world: Run) -> AsyncIterator[tuple[Members, Members, Members]]:
    """Driver, hop and last stage; only the hop knows both others."""
    async with AsyncExitStack() as stack:
        driver, hop, last = [
            await stack.enter_async_context(peer(world.trust.token(), stage, SIZES, NEAR_ONLY))
            for stage in (0, 1, 2)
        ]
        for one in (driver, last):
            await one.learn((hop.own_record()[0],), "the test")
            await hop.wait_for(hears(one.me), 30.0)
            await one.wait_for(hears(hop.me), 30.0)
        yield driver, hop, last


def hears(other: PeerId) -> Callable[[SwarmView], bool]:
    def told(view: SwarmView) -> bool:
        member = view.get(other)
        return member is not None and member.beat is not None

    return told


async def asked(one: Members, other: PeerId, for_whom: PeerId) -> SignedRecord:
    reply = await call(one._transport, other, METHOD, Introduce(for_whom), Introduced, timeout_s=10.0)
    return reply.header.record


async def insist(one: Members, other: PeerId, for_whom: PeerId) -> None:
    for _ in range(4 * introductions.ANSWERS_AT_ONCE):
        await asked(one, other, for_whom)


def test_a_stranger_at_the_end_of_a_chain_is_dialled_after_an_introduction(tmp_path: Path) -> None:
    async def scene(world: Run) -> None:
        async with a_chain(world) as (driver, hop, last):
            assert driver.view().get(last.me) is None, "they do not concern each other"
            with pytest.raises(PeerUnreachable):
                await asked(driver, last.me, hop.me)
            nobody = PeerKey.from_seed(bytes(32)).peer
            await driver.meet(last.me, [driver.me, nobody, last.me])
            assert driver.health().introductions.unmet == 1  # and whoever knows it is asked all the same
            await driver.meet(last.me, [hop.me, last.me])  # a chain in which it has no place
            with pytest.raises(PeerUnreachable):
                await asked(driver, last.me, hop.me)
            await asyncio.gather(*(driver.meet(last.me, [driver.me, hop.me, last.me]) for _ in range(9)))
            record = decode(PeerRecord, (await asked(driver, last.me, hop.me)).record)
            assert record.peer == hop.me
            health = driver.health().introductions
            assert (health.met, health.unmet) == (1, 1), "one question served all"
            await last.meet(driver.me, [driver.me, hop.me, last.me])  # a hop asks its driver for a verdict
            assert decode(PeerRecord, (await asked(last, driver.me, hop.me)).record).peer == hop.me
            assert driver.view().get(last.me) is None, "it serves to dial, not to judge who is alive"

    play_run(scene, tmp_path)


def test_a_record_that_comes_with_a_name_serves_to_dial_and_a_forged_one_is_refused(tmp_path: Path) -> None:
    async def scene(world: Run) -> None:
        async with a_chain(world) as (driver, hop, last):
            true = hop.record_of(last.me)
            assert true is not None
            other = hop.own_record()[0]
            for wrong in (replace(true, signature=bytes(64)), replace(true, record=b"\xff" * 99), other):
                with pytest.raises(RecordInvalid):
                    driver.introduced(last.me, wrong)
                with pytest.raises(PeerUnreachable):
                    await asked(driver, last.me, hop.me)
            driver.introduced(last.me, true)
            assert decode(PeerRecord, (await asked(driver, last.me, hop.me)).record).peer == hop.me
            assert driver.health().introductions.forged == 3

    play_run(scene, tmp_path)


def test_who_asks_without_end_or_for_made_up_ids_is_refused_and_counted(tmp_path: Path) -> None:
    async def scene(world: Run) -> None:
        async with a_chain(world) as (driver, hop, last):
            refused = hop.health().introductions.refused
            for _ in range(3):
                with pytest.raises(NotHere):
                    await asked(driver, hop.me, PeerKey.generate().peer)
            assert hop.health().introductions.refused == refused + 3
            with pytest.raises(Busy, match="too many introductions"):
                await insist(driver, hop.me, last.me)
            assert (await asked(last, hop.me, driver.me)).record, "others are answered all the same"

    play_run(scene, tmp_path)


def test_a_liars_introduction_teaches_nothing_and_is_not_asked_for_again_at_once(tmp_path: Path) -> None:
    """Carol has a place in the chain and answers with others' records, forged ones, and too much."""

    async def scene(world: Run) -> None:
        carol = world.member()
        liar = world.transport(member=carol)
        stranger = PeerKey.generate().peer
        async with peer(world.trust.token(), 0, SIZES, NEAR_ONLY) as driver:
            own = driver.own_record()[0]
            questions = 0

            async def lie(stream: Stream) -> None:
                nonlocal questions
                await stream.receive(Introduce)
                questions += 1
                answer = lies[questions - 1]
                await stream.send(answer, bytes(1 << 20) if questions == 3 else b"")

            text = encode(replace(decode(PeerRecord, own.record), peer=stranger))
            forged = SignedRecord(text, carol.key.sign(SIGNATURE_LABEL, world.trust.owner.run_id + text))
            lies = [Introduced(own), Introduced(forged), Introduced(own)]
            liar.serve(METHOD, lie, frozenset(Role))
            await liar.start()
            world.learn(liar)
            contact = world.contacts.get(liar.me)
            assert contact is not None
            driver._introductions._contacts.learn(contact)
            for tried in range(3):
                await driver.meet(stranger, [driver.me, liar.me, stranger])
                await driver.meet(stranger, [driver.me, liar.me, stranger])
                assert questions == tried + 1, "not again at once"
                assert driver.health().introductions.unmet == tried + 1
                with pytest.raises(PeerUnreachable):
                    await asked(driver, stranger, driver.me)
                driver._introductions._unknown.clear()  # as if that time were over
            assert driver.health().introductions.forged == 3

    play_run(scene, tmp_path)


@pytest.mark.parametrize("replicas", [3, 5])
def test_members_of_a_round_that_do_not_know_each_other_meet_through_its_leader(
    replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can be dialled but by a round's leader, until that one introduced it."""
    met: set[tuple[PeerId, PeerId]] = set()

    def meet_for(me: PeerId) -> Meet:
        async def meet(stranger: PeerId, chain: Sequence[PeerId]) -> None:
            asker, leader, other = chain
            assert (asker, other) == (me, stranger)
            if leader == me or (me, leader) in met:
                met.add((me, stranger))

        return meet

    def wrap(inner: Transport) -> Transport:
        dial = inner.open

        def dial_known(
            stranger: PeerId, method: str, channel: Channel = Channel.CONTROL
        ) -> AbstractAsyncContextManager[Stream]:
            if method.endswith("round"):
                met.update({(inner.me, stranger), (stranger, inner.me)})
            elif stranger != inner.me and (inner.me, stranger) not in met:
                raise PeerUnreachable(f"{inner.me} does not know {stranger}")
            return dial(stranger, method, channel)

        monkeypatch.setattr(inner, "open", dial_known)
        return inner

    async def main() -> None:
        async with World(replicas, wrap=wrap, meet_for=meet_for) as world:
            for _ in range(6):
                met.clear()
                await world.rounds(1)
            assert world.equal()
            for entry in world.entries():
                assert len(entry.contributors) == replicas
            assert not [kind for node in world.nodes for kind, _ in node.events if kind.endswith("-cut")]
            world.assert_every_step_is_in_once()

    run(main)
