"""A session that has become slow moves to a faster server while it goes on; its text stays the same.

Also who stands by for whom, and the rules that decide both.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

import pytest
from serving_world import PROMPT, World, draft_of, greedy, reference, serving_spec

from shoal.protocol.identity import PeerId
from shoal.protocol.virtual_time import run
from shoal.training.pipeline.replicas import Replica
from shoal.training.serving.chain import Generation
from shoal.training.serving.choice import choose, stand_by
from shoal.training.serving.link import Link
from shoal.training.serving.messages import SamplingOptions
from shoal.training.serving.pace import LASTING_S, Seat, Wish, wish

LONG = 240
SPEC = functools.partial(serving_spec, sequence=256)
DRAWING = SamplingOptions(temperature=0.8, top_p=0.95, seed=11)
SLOW = 10.0
Strike = Callable[[World, int], None]


async def text_with(stages: int, strike: Strike, replicas: int = 2) -> tuple[list[int], Generation, World]:
    """A long text; `strike` is called with the number of each token."""
    async with World(SPEC(stages), replicas) as world:
        for peer in world.peers:
            await peer.server.engine.warm(peer.versions.get(b""))
        text: list[int] = []
        async with world.generation(count=LONG, options=DRAWING) as generation:
            world.watched = generation
            async for token in generation:
                text.append(token)
                strike(world, len(text))
        await asyncio.sleep(5)
        assert not any(peer.server.sessions for peer in world.peers)
        return text, generation, world


@functools.cache
def undisturbed(stages: int) -> list[int]:
    text, generation, _ = run(lambda: text_with(stages, lambda world, at: None), limit_s=120)
    assert (generation.figures.moved, generation.figures.replaced) == (0, 0)
    return text


def slow_down(stage: int, at: int = 20) -> Strike:
    def strike(world: World, number: int) -> None:
        if number == at:
            world.slower[world.used(stage).name] = SLOW

    return strike


@pytest.mark.parametrize(("stages", "stage"), [(1, 0), (2, 0), (3, 1), (3, 2)])
def test_a_session_leaves_a_server_that_has_become_slow_and_its_text_stays(stages: int, stage: int) -> None:
    expected = undisturbed(stages)
    text, generation, world = run(lambda: text_with(stages, slow_down(stage)), limit_s=300)
    assert text == expected
    assert (generation.figures.moved, generation.figures.replaced) == (1, 0)
    slow, new = sorted(
        (peer for peer in world.peers if peer.stage == stage), key=lambda peer: peer.name not in world.slower
    )
    assert new.computed == len(PROMPT) + LONG - 1  # each position once, while the other one went on
    assert slow.computed < new.computed
    for peer in world.peers:
        if peer.stage != stage:
            assert peer.computed in (0, len(PROMPT) + LONG - 1)  # nobody else did anything twice
    step_s = 0.005 * SLOW
    assert generation.figures.longest_gap_s < 3 * step_s  # nobody waits for the new server to be built


def test_a_server_that_fails_while_another_is_built_beside_it_is_replaced_by_that_one() -> None:
    expected = undisturbed(2)
    slowed = slow_down(1)

    def strike(world: World, number: int) -> None:
        slowed(world, number)
        used = world.used(1)
        other = next(peer for peer in world.peers if peer.stage == 1 and peer is not used)
        if number > 20 and other.server.sessions and not any(peer.killed for peer in world.peers):
            world.kill(used)

    text, generation, _ = run(lambda: text_with(2, strike), limit_s=300)
    assert text == expected
    assert (generation.figures.moved, generation.figures.replaced) == (0, 1)


def test_a_text_with_a_draft_moves_as_well() -> None:
    async def main() -> None:
        async with World(SPEC(2), 2, duration_s=0.02) as world:
            text: list[int] = []
            async with world.generation(count=150, draft=draft_of(world, 0.1)) as generation:
                world.watched = generation
                async for token in generation:
                    text.append(token)
                    slow_down(1, at=60)(world, len(text))
            assert text == reference(world, PROMPT, 150)
            assert generation.figures.refused > 0
            assert (generation.figures.moved, generation.figures.replaced) == (1, 0)

    run(main, limit_s=120)


@pytest.mark.parametrize("victim", ["new", "before"])
def test_a_move_that_fails_costs_nothing(victim: str) -> None:
    expected = undisturbed(3)
    slowed = slow_down(1)

    def strike(world: World, number: int) -> None:
        slowed(world, number)
        used = world.used(1)
        other = next(peer for peer in world.peers if peer.stage == 1 and peer is not used)
        if number > 20 and other.server.sessions and not any(peer.killed for peer in world.peers):
            world.kill(other if victim == "new" else world.used(0))

    text, generation, world = run(lambda: text_with(3, strike), limit_s=300)
    assert any(peer.killed for peer in world.peers)
    assert text == expected
    assert generation.figures.moved == (0 if victim == "new" else 1)


def test_a_route_that_is_told_again_costs_no_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new route ends what was supplied beside the one before: the newcomer has to be named again."""
    beside, broken = Link.route_beside, list[Link]()

    def then_again(self: Link, epoch: int, stage: int, to: Link) -> None:
        beside(self, epoch, stage, to)
        if not broken and self.supplies is not None:
            broken.append(self)
            self.cut_s = 0.0  # `chain` names its route again

    monkeypatch.setattr(Link, "route_beside", then_again)
    text, generation, _ = run(lambda: text_with(3, slow_down(1)), limit_s=300)
    assert broken
    assert text == undisturbed(3)
    assert (generation.figures.moved, generation.figures.replaced) == (1, 0)


def test_a_newcomer_that_cannot_be_supplied_is_given_up() -> None:
    slowed = slow_down(1)

    def strike(world: World, number: int) -> None:
        slowed(world, number)
        used = world.used(1)
        other = next(peer for peer in world.peers if peer.stage == 1 and peer is not used)
        if number == 20:
            world.network.cut(world.used(0).name, other.name)

    text, generation, _ = run(lambda: text_with(3, strike), limit_s=300)
    assert text == undisturbed(3)
    assert (generation.figures.moved, generation.figures.replaced) == (0, 0)


def test_sessions_leave_a_slow_server_and_do_not_come_back() -> None:
    async def main() -> None:
        async with World(SPEC(2), 2) as world:
            slow = world.peers[2]

            async def one(seed: int) -> int:
                async with world.generation(count=LONG, seed=seed) as generation:
                    text = [token async for token in generation]
                assert text == expected
                return generation.figures.moved

            expected = greedy(world.spec, world.weights, PROMPT, LONG)
            texts = [asyncio.create_task(one(seed)) for seed in range(4)]
            await asyncio.sleep(0.5)
            world.slower[slow.name] = SLOW
            moves = await asyncio.gather(*texts)
            assert sum(moves) >= 1
            assert max(moves) <= 2
            await asyncio.sleep(5)
            assert not any(peer.server.sessions for peer in world.peers)

    run(main, limit_s=300)


def test_a_server_that_only_claims_to_be_fast_never_catches_up_and_never_gets_the_seat() -> None:
    async def main() -> None:
        async with World(SPEC(1), 2, duration_s=0.04) as world:
            honest, liar = world.peers
            world.slower[liar.name] = 5
            world.claims[liar.name] = 0.001
            world.hidden = {liar.name}
            async with world.generation(count=LONG) as generation:
                tokens = aiter(generation)
                text = [await anext(tokens)]
                world.hidden = set()
                text += [token async for token in tokens]
            assert text == reference(world, PROMPT, LONG)
            assert liar.computed > len(PROMPT)  # it was tried
            assert honest.computed == len(PROMPT) + LONG - 1
            assert generation.figures.moved == 0
            assert generation.figures.longest_gap_s < 0.05

    run(main, limit_s=120)


def test_who_stands_by_has_no_part_in_the_chain_and_takes_over() -> None:
    async def main() -> None:
        async with World(serving_spec(3), 3) as world, world.generation() as generation:
            world.watched = generation
            text = []
            async for token in generation:
                text.append(token)
                if len(text) in (10, 30):
                    standby = generation.standby()
                    assert None not in standby
                    assert not set(standby) & set(generation.route())
                    world.kill(world.used(1))
                if len(text) in (20, 40):
                    assert generation.route()[1] == standby[1]
            assert text == reference(world)

    run(main, limit_s=60)


def test_nobody_stands_by_where_nobody_else_is() -> None:
    async def main() -> None:
        async with World(serving_spec(2), 1) as world, world.generation(count=8) as generation:
            assert len([token async for token in generation]) == 8
            assert generation.standby() == [None, None]

    run(main, limit_s=60)


# --- the rules

A, B, C, D = (PeerId(name * 52) for name in "ABCD")


def one(peer: PeerId, step_s: float, rtt_s: float = 0.0, backlog_s: float = 0.0) -> Replica:
    return Replica(peer, rtt_s, backlog_s, step_s=step_s)


def wished(*replicas: Replica, here_s: float = 0.10, best_s: float = 0.02, left: int = 1000) -> Wish | None:
    """Of a chain of two stages, the first of which has one replica and takes 0.02 s."""
    seats = [Seat(A, 0.02, 0.02), Seat(B, here_s, best_s)]
    return wish(None, seats, {0: [one(A, 0.02)], 1: [one(B, here_s), *replicas]}, left, 7.0)


def test_a_move_is_wished_where_the_whole_round_gets_shorter_by_a_fifth() -> None:
    assert wished(one(C, 0.05)) == Wish(1, B, C, 7.0)
    assert wished(one(C, 0.081)) is None  # 0.120 against 0.101
    assert wished(one(C, 0.079)) == Wish(1, B, C, 7.0)
    assert wished(one(C, 0.05), one(D, 0.04)) == Wish(1, B, D, 7.0)


def test_the_way_and_the_queue_count() -> None:
    assert wished(one(C, 0.05, rtt_s=0.07)) is None
    assert wished(one(C, 0.05, backlog_s=0.04)) is None


def test_who_claims_nothing_is_believed_to_be_as_fast_as_this_one_was_at_its_best() -> None:
    assert wished(one(C, 0.0)) == Wish(1, B, C, 7.0)
    assert wished(one(C, 0.0), best_s=0.10) is None


def test_no_move_for_the_last_words_nor_before_all_is_measured() -> None:
    assert wished(one(C, 0.05), left=19) is None  # 19 times 0.05 s is less than a second
    assert wished(one(C, 0.05), here_s=0.0) is None


def test_a_wish_grows_old_while_it_is_the_same_server_that_is_slow() -> None:
    seats = [Seat(A, 0.02, 0.02), Seat(B, 0.10, 0.02)]

    def later(before: Wish | None, now_s: float, *others: Replica) -> Wish | None:
        return wish(before, seats, {0: [one(A, 0.02)], 1: list(others)}, 1000, now_s)

    first = later(None, 1.0, one(C, 0.05))
    second = later(first, 5.0, one(C, 0.05), one(D, 0.04))
    assert second == Wish(1, B, D, 1.0)
    assert not second.is_due(1.0 + LASTING_S - 0.1, 1.0)
    assert second.is_due(1.0 + LASTING_S, 1.0)
    assert not second.is_due(1.0 + LASTING_S, 1.2)
    assert later(second, 6.0) is None


def test_a_server_is_chosen_by_the_way_its_queue_and_its_step() -> None:
    assert choose([one(A, 0.05), one(B, 0.02)], {}, 0.0, 0.5) == B
    assert choose([one(A, 0.05), one(B, 0.02, rtt_s=0.1)], {}, 0.0, 0.5) == A
    assert choose([one(A, 0.05), one(B, 0.02, backlog_s=0.1)], {}, 0.0, 0.5) == A
    assert choose([one(A, 0.05), one(B, 0.0)], {B: 1.0}, 0.0, 0.5) == A
    assert {choose([one(A, 0.05), one(B, 0.0)], {}, 0.0, draw) for draw in (0.1, 0.9)} == {A, B}


def test_who_stands_by_stays_the_same_while_it_can() -> None:
    replicas = [one(A, 0.01), one(B, 0.02), one(C, 0.03)]
    assert stand_by(replicas, [A], None, {}, 0.0, 0.5) == B
    assert stand_by(replicas, [A], C, {}, 0.0, 0.5) == C
    assert stand_by(replicas, [A, C], C, {}, 0.0, 0.5) == B
    assert stand_by(replicas, [A], C, {C: 9.0}, 0.0, 0.5) == B
    assert stand_by(replicas[:1], [A], None, {}, 0.0, 0.5) is None
