"""Rounds under faults: whoever dies at whatever message, the others commit in seconds and lose nothing."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

import pytest
from outer_faults import Faults
from outer_world import Node, World, round_spec

from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Buffer
from shoal.protocol.virtual_time import run
from shoal.protocol.wire import COUNT_MOST
from shoal.training.outer.entry import Entry, Seat
from shoal.training.outer.messages import (
    Answer,
    Commit,
    ContributedPart,
    Contributing,
    Done,
    Go,
    Prepare,
    PublishedPart,
    Publishing,
    Report,
)

MESSAGES = (
    Prepare,
    Answer,
    Go,
    Contributing,
    ContributedPart,
    Publishing,
    PublishedPart,
    Report,
    Commit,
    Done,
)
POINTS = ("before", "after", "receiving")


def node_of(world: World, peer: PeerId) -> Node:
    return next(node for node in world.nodes if node.name == peer)


def now() -> float:
    return asyncio.get_running_loop().time()


async def disturbed_round(world: World, faults: Faults, limit_s: float) -> None:
    """One round in which the armed fault strikes, then two clean ones; then all must be as promised."""
    for node in world.nodes:
        node.step()
        node.step()
    begin = now()
    async with asyncio.timeout(30):
        while faults.hit is None:
            await asyncio.sleep(0.01)
        survivors = [node for node in world.live.values() if node.name != faults.hit]
        await world.reach(3, survivors)
    assert now() - begin < limit_s
    await world.rounds(2, survivors)
    assert world.equal(survivors)
    world.assert_every_step_is_in_once()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_peer_delays_the_others_by_seconds(kind: type, point: str, count: int) -> None:
    faults = Faults()

    async def main() -> None:
        async with World(4, wrap=faults.wrap) as world:
            await world.rounds(2)
            faults.arm(kind, point, lambda peer: world.kill(node_of(world, peer)), count=count)
            await disturbed_round(world, faults, limit_s=3.0)

    run(main)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("point", ["before", "receiving"])
def test_a_frozen_peer_delays_the_others_by_seconds_and_comes_back(kind: type, point: str) -> None:
    faults = Faults()

    async def main() -> None:
        async with World(4, wrap=faults.wrap) as world:
            await world.rounds(2)
            faults.arm(kind, point, lambda peer: world.freeze(node_of(world, peer)))
            await disturbed_round(world, faults, limit_s=8.0)
            assert faults.hit is not None
            frozen = node_of(world, faults.hit)
            world.thaw(frozen)
            faults.wake()
            await world.rounds(2)
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


def test_a_dead_owners_parts_are_skipped_and_lose_nothing() -> None:
    faults = Faults()

    async def main() -> None:
        async with World(4, wrap=faults.wrap) as world:
            await world.rounds(2)
            faults.arm(PublishedPart, "before", lambda peer: world.kill(node_of(world, peer)))
            await disturbed_round(world, faults, limit_s=3.0)
            skipped = [entry.digests.count(bytes(32)) for entry in world.entries()]
            assert skipped[2] > 0
            assert skipped[3:] == [0, 0], "the parts have another owner in the next round"

    run(main)


def test_two_die_at_once_leader_among_them() -> None:
    faults = Faults()

    async def main() -> None:
        async with World(5, wrap=faults.wrap) as world:
            await world.rounds(2)

            def strike(peer: PeerId) -> None:
                world.kill(node_of(world, peer))
                world.kill(next(iter(world.live.values())))

            faults.arm(Go, "after", strike)
            await disturbed_round(world, faults, limit_s=4.0)

    run(main)


def test_a_leader_that_dies_amid_its_commits_leaves_one_entry() -> None:
    for count in (1, 2, 3):
        faults = Faults()

        async def main(faults: Faults = faults, count: int = count) -> None:
            async with World(4, wrap=faults.wrap) as world:
                await world.rounds(2)
                faults.arm(Commit, "after", lambda peer: world.kill(node_of(world, peer)), count=count)
                await disturbed_round(world, faults, limit_s=3.0)

        run(main)


def corrupt(kind: type, who: PeerId, change: object) -> object:
    """A tamper function: `who` sends broken payloads in messages of a kind."""

    def tamper(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
        if isinstance(header, kind) and peer == who:
            return header, change(bytes(payload))  # type: ignore[operator]
        return header, payload

    return tamper


BROKEN = {
    "too long": lambda data: data + bytes(4),
    "too short": lambda data: data[:-4],
    "not finite": lambda data: b"\x00\x00\xc0\x7f" + data[4:],
    "far louder than declared": lambda data: b"\x00\x00\x7a\x60" + data[4:],
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("family", ["float32", "int8"])
@pytest.mark.parametrize("kind", [ContributedPart, PublishedPart], ids=lambda kind: kind.__name__)
def test_a_malformed_part_is_refused_and_its_sender_counted(kind: type, family: str, change: object) -> None:
    if kind is PublishedPart and change is BROKEN["far louder than declared"]:
        change = BROKEN["not finite"]  # an owner that lies about the mean is the business of audits
    faults = Faults()
    spec = round_spec(outer={"part_bytes": 1024}, compression={"contribution": family, "published": family})

    async def main() -> None:
        async with World(4, spec, wrap=faults.wrap) as world:
            await world.rounds(1)
            liar = world.nodes[2]
            faults.tamper = corrupt(kind, liar.name, change)  # type: ignore[assignment]
            await world.rounds(1)
            honest = [node for node in world.nodes if node is not liar]
            assert sum(node.outer.status()["refused"].get(liar.name, 0) for node in honest) > 0  # type: ignore[attr-defined]
            assert any(peer == liar.name for node in honest for peer, _ in node.suspected)
            faults.tamper = Faults().tamper
            await world.rounds(2)
            assert world.equal()
            if family == "float32":
                world.assert_every_step_is_in_once()

    run(main)


def test_weights_that_are_not_finite_stay_at_home() -> None:
    async def main() -> None:
        async with World(3) as world:
            await world.rounds(1)
            world.nodes[0].weights.weights[17] = float("nan")
            await world.rounds(2)
            assert world.equal()
            assert world.nodes[1].outer.anchor.isfinite().all()
            entry = world.nodes[1].outer.entry(3)
            assert entry is not None
            assert len(entry.contributors) == 2

    run(main)


@pytest.mark.parametrize(
    "claim",
    [
        lambda answer: dataclasses.replace(answer, tokens=COUNT_MOST),
        lambda answer: dataclasses.replace(answer, from_step=0),
        lambda answer: dataclasses.replace(answer, to_step=COUNT_MOST),
    ],
    ids=["tokens", "overlap", "steps"],
)
def test_a_member_that_claims_what_no_log_can_hold_fails_no_round_of_the_others(
    claim: Callable[[Answer], Answer],
) -> None:
    """Tokens whose sum no entry can carry, or steps that are listed already, failed round after round."""
    faults = Faults()

    async def main() -> None:
        async with World(4, wrap=faults.wrap) as world:
            await world.rounds(1)
            liar = world.nodes[2]

            def tamper(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
                if peer == liar.name and isinstance(header, Answer):
                    header = claim(header)
                return header, payload

            faults.tamper = tamper
            honest = [node for node in world.nodes if node is not liar]
            begun = now()
            for height in (2, 3):
                world.everybody_steps()
                world.everybody_steps()
                await world.reach(height, honest)
            assert now() - begun < 20
            assert world.equal(honest)
            listed = {seat.peer for entry in world.entries()[1:] for seat in listed_seats(entry)}
            assert {node.name for node in honest} <= listed

    run(main)


def test_a_round_that_cannot_be_proposed_ends_nobody() -> None:
    """An offer that no entry can hold (a group too large, say) ended the leader's whole peer."""

    async def main() -> None:
        async with World(3) as world:
            await world.rounds(1)
            world.uplinks = dict.fromkeys(world.live, 1e300)
            world.everybody_steps()
            world.everybody_steps()
            await asyncio.sleep(10.0)
            assert not [node.name for node in world.nodes if node.task is None or node.task.done()]
            assert [kind for node in world.nodes for kind, _ in node.events].count("outer-retry")
            world.uplinks.clear()
            await world.reach(2)
            await world.rounds(1)
            assert world.equal()

    run(main)


def listed_seats(entry: Entry) -> list[Seat]:
    return [entry.roster[row.seat] for row in entry.contributors]
