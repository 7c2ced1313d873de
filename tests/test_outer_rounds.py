"""Rounds without faults: equal bits (P1), every step in once (P4), parity, codecs, leaving, determinism."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import torch
from outer_faults import Faults
from outer_world import Node, World, round_spec

from shoal.protocol.identity import PeerId
from shoal.protocol.memory_transport import Link
from shoal.protocol.transport import Buffer
from shoal.protocol.virtual_time import run
from shoal.training.outer.change import Change
from shoal.training.outer.messages import ContributedPart, PublishedPart

LATENCY_S = 0.1


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_groups_hold_equal_bits_and_every_step_once_over_20_rounds(replicas: int) -> None:
    async def main() -> None:
        async with World(replicas) as world:
            for _ in range(20):
                await world.rounds(1)
                assert world.equal()
            world.assert_every_step_is_in_once()
            tokens = sum(node.weights.tokens for node in world.nodes)
            assert world.nodes[0].outer.tokens == tokens

    run(main)


def test_int8_stays_close_to_float32_and_equal_in_bits() -> None:
    async def anchors(family: str) -> torch.Tensor:
        spec = round_spec(compression={"contribution": family, "published": family})
        async with World(4, spec) as world:
            await world.rounds(10)
            assert world.equal()
            return world.nodes[0].outer.anchor - world.genesis

    exact, coarse = run(anchors("float32")), run(anchors("int8"))
    assert 0.0 < float((exact - coarse).norm() / exact.norm()) < 0.015


def test_with_rate_one_and_no_momentum_a_round_is_the_mean_of_the_steps() -> None:
    outer = {"inner_steps": 1, "learning_rate": 1.0, "momentum": 0.0}

    async def main() -> None:
        async with World(2, round_spec(outer=outer)) as world:
            expected = world.genesis.double()
            for _ in range(3):
                one, other = world.nodes
                one.step(100)
                other.step(300)
                await world.reach(one.outer.height + 1)
                expected += 0.25 * one.changes[-1] + 0.75 * other.changes[-1]
                for node in world.nodes:
                    torch.testing.assert_close(node.weights.weights.double(), expected, rtol=1e-5, atol=1e-6)

    run(main)


def test_steps_made_during_a_round_are_kept() -> None:
    faults = Faults()
    faults.hangs = False

    async def main() -> None:
        async with World(3, wrap=faults.wrap) as world:
            for node in world.nodes:  # a step of everybody's just when the first mean is published
                node.step()
                node.step()
            faults.arm(PublishedPart, "before", lambda peer: world.everybody_steps())
            await world.reach(1)
            assert faults.hit is not None
            assert [node.outer.steps_since_round for node in world.nodes] == [1, 1, 1]
            world.assert_every_step_is_in_once()
            await world.rounds(2)
            world.assert_every_step_is_in_once()

    run(main)


def test_a_late_contribution_stays_in_the_local_weights_and_comes_with_the_next_round() -> None:
    async def main() -> None:
        async with World(4) as world:
            slow = world.nodes[3]
            for other in world.nodes[:3]:  # 20 kB at 1 kB/s: far beyond the deadline of 4 s
                world.network.set_link(slow.name, other.name, Link(bytes_per_s=1e3), one_way=True)
            await world.rounds(1)
            entry = world.nodes[0].outer.entry(1)
            assert entry is not None
            late = entry.seat_of(slow.name)
            assert late is not None
            assert entry.row_of(late) is None or slow.outer.steps_since_round == 0
            world.assert_every_step_is_in_once()
            for other in world.nodes[:3]:
                world.network.set_link(slow.name, other.name, Link(), one_way=True)
            await world.rounds(2)
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


def test_over_a_slow_link_contributions_go_before_means() -> None:
    faults = Faults()

    async def main() -> None:
        async with World(2, wrap=faults.wrap) as world:
            slow, quick = (node.name for node in world.nodes)
            world.network.set_link(slow, quick, Link(bytes_per_s=2e4), one_way=True)
            sent: list[type] = []

            def note(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
                if peer == slow and isinstance(header, ContributedPart | PublishedPart):
                    sent.append(type(header))
                return header, payload

            faults.tamper = note
            await world.rounds(1)
            assert {*sent} == {ContributedPart, PublishedPart}
            assert sent == sorted(sent, key=lambda kind: kind.__name__)
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


def test_a_slow_peer_contributes_what_it_has() -> None:
    async def main() -> None:
        async with World(3) as world:
            fast, middle, _ = world.nodes
            for _ in range(4):
                fast.step()
            for _ in range(2):
                middle.step()
            await world.reach(1)
            entry = fast.outer.entry(1)
            assert entry is not None
            assert [row.to_step for row in entry.contributors] == [4, 2]
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


def test_a_leaver_takes_its_last_steps_into_the_log_first() -> None:
    async def main() -> None:
        async with World(3) as world:
            await world.rounds(2)
            leaver = world.nodes[1]
            leaver.step()
            assert leaver.outer.steps_since_round == 1
            async with asyncio.timeout(5):
                await leaver.outer.final_round()
            assert leaver.outer.steps_since_round == 0
            await leaver.stop()
            await world.rounds(2)
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


@pytest.mark.parametrize("number", range(3))
def test_a_leaver_that_led_its_last_round_has_told_the_others_of_it(number: int) -> None:
    """Once it applied the entry before its COMMIT was on the way, and left: the others decided anew."""

    async def main() -> None:
        async with World(3) as world:
            await world.rounds(2)
            leaver = world.nodes[number]
            for node in world.nodes:
                if node is not leaver:
                    world.network.set_link(leaver.name, node.name, Link(latency_s=0.2))
            leaver.step()
            async with asyncio.timeout(10):
                await leaver.outer.final_round()
            height, head = leaver.outer.height, leaver.outer.head
            await leaver.stop()
            await world.reach(height)
            assert all(node.outer.head == head for node in world.live.values())
            world.assert_every_step_is_in_once()

    run(main)


def test_a_leaver_waits_for_who_was_away_from_its_last_round() -> None:
    async def main() -> None:
        async with World(2) as world:
            leaver, other = world.nodes
            await world.rounds(2)
            world.freeze(other)
            leaver.step()
            leaver.step()
            await world.reach(3, [leaver])
            world.thaw(other)
            async with asyncio.timeout(10):
                await leaver.outer.final_round()
            await leaver.stop()
            assert other.outer.height == 3
            await world.rounds(2)
            world.assert_every_step_is_in_once()

    run(main)


def test_who_goes_elsewhere_in_the_middle_of_a_round_is_not_waited_for() -> None:
    """Its transport stays, for its next stage: once the leader waited twice the round's deadline."""

    async def main() -> None:
        async with World(3, round_spec(outer={"round_deadline_s": 30.0})) as world:
            await world.rounds(2)
            for one, other in itertools.combinations(world.nodes, 2):
                world.network.set_link(one.name, other.name, Link(latency_s=LATENCY_S))
            world.everybody_steps()
            world.everybody_steps()
            while not (leaders := [node for node in world.nodes if ("round-open", 3) in opened(node)]):
                await asyncio.sleep(0.05)
            await asyncio.sleep(3.5 * LATENCY_S)  # PREPARE, answer and GO; not all contributions yet
            mover = next(node for node in world.nodes if node not in leaders)
            world.live.pop(mover.name)
            assert mover.task is not None
            mover.task.cancel()
            await world.reach(3, limit_s=5.0)
            await mover.stop()
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


def opened(node: Node) -> list[tuple[str, object]]:
    return [(kind, data.get("height")) for kind, data in node.events]


def test_the_leader_changes_and_positions_of_data_are_recorded() -> None:
    async def main() -> None:
        async with World(4) as world:
            await world.rounds(12)
            assert len({entry.leader for entry in world.entries()}) > 1
            assert all(entry.revision == 0 and entry.fragment == 0 for entry in world.entries())

    run(main)


def test_equal_seeds_give_equal_traces() -> None:
    async def trace(seed: int) -> tuple[str, bytes]:
        async with World(4, seed=seed) as world:
            for link in world.nodes[1:]:
                world.network.set_link(world.nodes[0].name, link.name, Link(latency_s=0.03, loss=0.1))
            await world.rounds(4)
            return world.network.trace_digest(), world.nodes[0].outer.head

    first, again, other = run(trace(7)), run(trace(7)), run(trace(8))
    assert first == again
    assert first != other


def test_what_changes_in_the_turn_in_which_a_poll_times_out_is_heard() -> None:
    async def main() -> None:
        change = Change()
        waiting = asyncio.create_task(change.wait(1.0))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_at(1.0, change.notify)
        assert await waiting
        assert not await change.wait(2.0)

    run(main)


def test_a_wait_that_is_put_off_ends_in_time_or_with_what_is_raised() -> None:
    async def main() -> None:
        change, loop = Change(), asyncio.get_running_loop()
        asked_s: list[float] = []

        def again_s() -> float | None:
            asked_s.append(loop.time())
            if len(asked_s) > 4:
                raise ValueError("looked too often")
            return loop.time() + 1.0 if len(asked_s) != 3 else None

        assert not await change.wait(1.0, again_s)
        assert asked_s == [1.0, 2.0, 3.0]
        with pytest.raises(ValueError, match="too often"):
            await change.wait(4.0, again_s)
        loop.call_at(6.5, change.notify)
        assert await change.wait(6.0, lambda: 7.0)
        assert loop.time() == 6.5

    run(main)
