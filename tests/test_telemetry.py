"""Telemetry: what peers tell the owner's peers, over memory links and virtual time."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from view_peers import TRAINER, Listed, World, round_told, training
from view_world import NOW, replica

from shoal.node.inference.checking import DISAGREE, in_words, telling_owners
from shoal.node.view import intake
from shoal.node.view.buffer import EVENTS, Buffer
from shoal.node.view.messages import (
    METHOD,
    TelemetryBatch,
    TelemetryEvent,
    TelemetryField,
    TelemetryHello,
    TelemetryTaken,
)
from shoal.node.view.snapshot import Snapshot
from shoal.protocol import virtual_time
from shoal.protocol.errors import Busy, MessageInvalid
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Stream
from shoal.protocol.wire import decode, encode
from shoal.training.serving.audit import Disagreement

Scene = Callable[[World], Awaitable[None]]


def play(scene: Scene, seed: int = 1) -> None:
    async def staged() -> None:
        world = World(seed)
        try:
            await scene(world)
        finally:
            await world.close()

    virtual_time.run(staged)


def kinds(snapshot: Snapshot) -> list[tuple[str, str]]:
    return [(event.peer, event.kind) for event in snapshot.events]


# --- what gets there


def test_what_a_program_found_out_about_answers_reaches_the_owner() -> None:
    async def scene(world: World) -> None:
        owner = await world.add("owner", owner=True)
        world.members["client"] = replica("client", 0)
        transport = world.network.transport(PeerId("gateway"), TRAINER)
        await transport.start()
        world.members["gateway"] = dataclasses.replace(replica("gateway", 0), stages=(), state="observing")
        presence: Any = SimpleNamespace(
            transport=transport, members=Listed(transport.me, world), incarnation=9, rng=random.Random(1)
        )
        counts = {"agreed": 40, "disagreed": 0, "unchecked": 2}
        async with telling_owners(presence, lambda: counts) as buffer:
            await asyncio.sleep(6.0)
            assert owner.observer.snapshot().trust.audits == counts
            counts = {"agreed": 41, "disagreed": 1, "unchecked": 2}
            found = Disagreement(7, 1, 2, (PeerId("owner"), PeerId("nobody")), (PeerId("client"),))
            buffer.add(DISAGREE, in_words(found, presence.members.view()))
            await asyncio.sleep(6.0)
            seen = owner.observer.snapshot()
            assert seen.trust.audits == counts
            (told,) = [event for event in seen.events if event.kind == DISAGREE]
            assert told.peer == "gateway"
            assert "name of owner → somebody, and name of client recomputed it" in told.text
        await transport.close()

    play(scene)


def test_what_happens_at_a_peer_is_in_the_owners_snapshot_a_second_later() -> None:
    async def scene(world: World) -> None:
        owner, peer = await world.add("owner", owner=True), await world.add("peer")
        peer.training = training(stage=1, tokens=777)
        await asyncio.sleep(6.0)
        peer.buffer.add("reroute", {"stage": 1, "to": "other", "seconds": 0.5})
        peer.buffer.add("round", round_told(3))
        await asyncio.sleep(1.6)
        seen = owner.observer.snapshot()
        assert kinds(seen) == [("peer", "reroute")]
        assert [row.height for row in seen.rounds] == [3]
        assert seen.events[0].text == "stage 1: another replica took over after 0.50 s"
        row = next(row for row in seen.peers if row.peer == "peer")
        assert (row.tokens, row.micro_batches, row.rejected, row.redone) == (777, 10, 1, 2)
        assert seen.churn.reroute_p50_s == 0.5
        assert seen.coordinator.pushing == 1

    play(scene)


def test_a_round_is_one_row_with_every_members_phases_and_the_slowest_of_each() -> None:
    async def scene(world: World) -> None:
        owner = await world.add("owner", owner=True)
        slow = {"send": {"start_s": 0.5, "s": 4.0}}
        for name in ("a", "b"):
            told = round_told(3) if name == "a" else round_told(3, phases=slow, loss=5.0)
            (await world.add(name)).buffer.add("round", told)
        await asyncio.sleep(3.0)
        (row,) = owner.observer.snapshot().rounds
        assert (row.stage, row.height, row.bytes_out, row.codecs) == (0, 3, 2_000_000, ("int8", "int8"))
        assert [member.peer for member in row.members] == ["b", "a"]
        assert row.seconds == 4.5
        assert row.slowest == {"inner": "a", "prepare": "a", "send": "b", "apply": "a"}
        (point,) = owner.observer.snapshot().loss
        assert (point.tokens, point.train) == (3 * 40_960, 4.0)
        assert owner.observer.snapshot().compression[0].bits_per_value == 8.5

    play(scene)


def test_figures_of_who_is_gone_count_no_longer() -> None:
    async def scene(world: World) -> None:
        owner = await world.add("owner", owner=True)
        peer = await world.add("peer")
        peer.training = training(stage=1, retries=10)
        await asyncio.sleep(12.0)
        assert owner.observer.snapshot().throughput.lost[-1].what == "redone"
        await world.remove("peer")
        await asyncio.sleep(1.0)
        assert owner.observer.snapshot().throughput.lost == ()

    play(scene)


def test_two_owners_are_told_the_same_and_tell_each_other() -> None:
    async def scene(world: World) -> None:
        first, second = await world.add("one", owner=True), await world.add("two", owner=True)
        peer = await world.add("peer")
        peer.buffer.add("stage-found", {"stage": 1, "height": 4})
        first.buffer.add("moving", {"text": "moves"})
        await asyncio.sleep(3.0)
        for owner in (first, second):
            told = sorted(kinds(owner.observer.snapshot()))
            assert told == [("one", "moving"), ("peer", "stage-found")]

    play(scene)


# --- an owner that is away


def test_what_happened_while_the_owner_was_away_for_ten_minutes_is_there_within_ten_seconds(
    tmp_path: Path,
) -> None:
    async def scene(world: World) -> None:
        await world.add("owner", owner=True, folder=tmp_path)
        peers = [await world.add(f"peer{number:02}") for number in range(12)]
        for peer in peers:
            peer.buffer.add("round", round_told(1))
        await asyncio.sleep(5.0)
        await world.remove("owner")
        for height in (2, 3):
            await asyncio.sleep(300.0)
            for peer in peers:
                peer.buffer.add("round", round_told(height))
        owner = await world.add("owner", owner=True, folder=tmp_path)
        await asyncio.sleep(10.0)
        seen = owner.observer.snapshot()
        assert {row.height: len(row.members) for row in seen.rounds} == {1: 12, 2: 12, 3: 12}
        assert seen.coordinator.pushing == 12
        assert seen.coordinator.events_taken == 24, "nothing twice, nothing missing"
        assert [point.tokens for point in seen.loss] == [40_960, 2 * 40_960, 3 * 40_960]

    play(scene)


def test_an_owner_that_lost_its_disk_is_told_again_what_buffers_still_hold(tmp_path: Path) -> None:
    async def scene(world: World) -> None:
        peer = await world.add("peer")
        await world.add("owner", owner=True, folder=tmp_path)
        peer.buffer.add("round", round_told(1))
        await asyncio.sleep(3.0)
        await world.remove("owner")
        owner = await world.add("owner", owner=True)
        await asyncio.sleep(5.0)
        assert [row.height for row in owner.observer.snapshot().rounds] == [1]

    play(scene)


def test_a_buffer_without_reader_keeps_the_newest_and_counts_the_rest() -> None:
    buffer = Buffer(clock=lambda: NOW)
    for number in range(3 * EVENTS):
        buffer.add(f"kind {number % 200}", {"number": number})
    assert len(buffer) == EVENTS
    assert buffer.dropped == 2 * EVENTS
    assert buffer.after(0)[0].number == 2 * EVENTS + 1


def test_a_frequent_kind_does_not_push_the_others_out() -> None:
    buffer = Buffer(clock=lambda: NOW)
    buffer.add("round", {"height": 1})
    for number in range(10 * EVENTS):
        buffer.add("retry", {"number": number})
    assert buffer.after(0)[0].kind == "round"
    assert buffer.dropped > 8 * EVENTS


# --- what must not get there


def test_secrets_and_places_on_a_volunteers_disk_stay_at_home() -> None:
    buffer = Buffer(clock=lambda: NOW)
    buffer.add("invitation", {"text": "join with shoal1-abcdef"})
    buffer.add("dashboard-link", {"url": "http://127.0.0.1/login?once=1"})
    buffer.add(
        "plan",
        {
            "text": "join with shoal1-abcdef",
            "token": "x",
            "path": "/home/ada",
            "device": "cpu",
            "of": {"token": "x", "url": "x"},
        },
    )
    buffer.add("peer_joined", {"peer": "of no interest, since everybody sees it"})
    (event,) = buffer.after(0)
    told = {field.name: field.text for field in event.fields}
    assert told == {"text": "(secret)", "device": "cpu"}


def test_odd_values_are_told_as_what_can_be_told() -> None:
    buffer = Buffer(clock=lambda: NOW)
    buffer.add(
        "round", {"loss": float("nan"), "big": 10**400, "no": None, "bad": "\ud800", "long": "x" * 999}
    )
    (event,) = decode(TelemetryBatch, encode(TelemetryBatch(buffer.after(0)))).events
    told = {field.name: field.number if field.numeric else field.text for field in event.fields}
    assert told["loss"] == "nan"
    assert told["bad"] == "?"
    assert set(told) == {"loss", "big", "bad", "long"}


def test_a_batch_of_the_longest_events_fits_in_a_message() -> None:
    buffer = Buffer(clock=lambda: NOW)
    for _ in range(40):
        buffer.add("\U0001f41f" * 32, {f"{n:02}" + "\U0001f41f" * 38: "\U0001f41f" * 160 for n in range(60)})
    number = 0
    while batch := buffer.after(number):
        encode(TelemetryBatch(batch))
        number = batch[-1].number
    assert number == 40


# --- a volunteer that means ill


@asynccontextmanager
async def talking(
    world: World, owner: PeerId, name: str = "mallory", token_id: str = ""
) -> AsyncIterator[Stream]:
    """A stream on which a peer may say what it likes."""
    transport = world.network.transport(PeerId(name), TRAINER, token_id)
    await transport.start()
    async with transport.open(owner, METHOD) as stream:
        await stream.send(TelemetryHello(1))
        await stream.receive(TelemetryTaken)
        yield stream
    world.network.kill(transport.me)


def event(number: int, kind: str = "note", **fields: str | float) -> TelemetryEvent:
    told = tuple(
        TelemetryField(name, number=value, numeric=True)
        if isinstance(value, float)
        else TelemetryField(name, value)
        for name, value in fields.items()
    )
    return TelemetryEvent(number, NOW, kind, told)


def test_whoever_is_named_in_an_event_the_sender_is_whom_the_stream_proves() -> None:
    async def scene(world: World) -> None:
        owner = await world.add("owner", owner=True)
        victim = await world.add("victim")
        async with talking(world, owner.peer) as stream:
            forged = event(1, "peer_gone", peer="victim", name="victim", reason="it was me")
            await stream.send(TelemetryBatch((forged,)))
            await stream.receive(TelemetryTaken)
        seen = owner.observer.snapshot()
        assert kinds(seen) == [("mallory", "peer_gone")]
        assert seen.churn.leaves == 0, "only what this peer saw itself counts as leaving"
        assert next(row for row in seen.peers if row.peer == victim.peer).told_s is not None

    play(scene)


def test_html_control_characters_and_absurd_figures_are_shown_as_harmless_text() -> None:
    async def scene(world: World) -> None:
        owner = await world.add("owner", owner=True)
        async with talking(world, owner.peer) as stream:
            events = (
                event(1, "<script>\x1b[2J\n", text="<img onerror=x>\x00\u202e" + "y" * 100),
                event(2, "reroute", stage="none"),
                event(3, "checkpoint", bytes="much", what="stage " + "9" * 100),
                event(4, "checkpoint", bytes=1.0, what="stage 0000" + "7" * 9, height=1.0),
                event(5, "round", height=1e300, stage=-1.0, seconds=-5.0),
                event(
                    6, "round", height=3.0, stage=0.0, **{"phases.send.start_s": 1e9, "phases.send.s": -1.0}
                ),
            )
            await stream.send(TelemetryBatch(events))
            await stream.receive(TelemetryTaken)
        seen = owner.observer.snapshot()
        assert all(event.text.isprintable() and event.kind.isprintable() for event in seen.events)
        assert [row.height for row in seen.rounds] == [3], (
            "one with a height that the stage has not is left out"
        )
        assert seen.rounds[0].members[0].phases == ()
        Snapshot.from_json(seen.to_json())

    play(scene)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e301])
def test_numbers_that_are_none_do_not_cross_the_wire(value: float) -> None:
    with pytest.raises(MessageInvalid):
        encode(event(1, "note", loss=value))


def test_a_flood_costs_its_sender_the_stream_and_the_owner_a_bounded_room() -> None:
    async def scene(world: World) -> None:
        owner = await world.add("owner", owner=True)
        number, refused = 0, 0
        for _ in range(5):
            try:
                async with talking(world, owner.peer) as stream:
                    while True:
                        await stream.send(TelemetryBatch(tuple(event(number + n) for n in range(1, 33))))
                        number += 32
                        await stream.receive(TelemetryTaken)
            except Busy:
                refused += 1
                world.network.kill(PeerId("mallory"))
        assert refused == 5
        health = owner.observer.snapshot().coordinator
        assert health.events_taken <= intake.EVENTS + 60 * intake.EVENTS_PER_S
        assert health.events_refused > 0

    play(scene)


def test_holders_of_one_token_do_not_take_everybodys_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "PEERS_OF_A_TOKEN", 4)

    async def scene(world: World) -> None:
        owner = await world.add("owner", owner=True)
        for number in range(9):
            async with talking(world, owner.peer, f"sybil{number}", token_id="one token"):
                pass
        assert len(owner.observer._told()) == 4 + 1

    play(scene)
