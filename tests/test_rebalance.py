"""Rebalancing: plans help the slowest stage and come to rest; groups let go one at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from outer_world import World, round_spec

from shoal.dht.view import LEAST_SERVICE_S, Member, SwarmView
from shoal.protocol import limits
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.virtual_time import run
from shoal.training.outer.policy import may_leave
from shoal.training.rebalance import LEAST_GAP, Move, Placed, plan, settled
from shoal.training.tenure import overlooks, placed

MOVE_S = 20.0


def swarm(*stages: list[float]) -> list[Placed]:
    """Replicas of each stage by their seconds a micro-batch."""
    return [
        Placed(PeerId(f"{stage}-{i}"), stage, service_s)
        for stage, group in enumerate(stages)
        for i, service_s in enumerate(group)
    ]


def moved(replicas: list[Placed], move: Move, costs: list[float]) -> list[Placed]:
    """After the move: seconds a micro-batch change with the cost of the stage."""
    ratio = costs[move.target] / costs[move.source]
    return [
        dataclasses.replace(r, stage=move.target, service_s=r.service_s * ratio) if r.peer == move.peer else r
        for r in replicas
    ]


def stage_rates(replicas: list[Placed], stages: int) -> list[float]:
    return [sum(1 / r.service_s for r in replicas if r.stage == stage) for stage in range(stages)]


def pipeline_rate(replicas: list[Placed], stages: int) -> float:
    return min(stage_rates(replicas, stages))


def test_of_many_slow_stages_one_after_the_other_is_helped() -> None:
    """Two equally slow ones: helping one alone makes the pipeline no faster, and still is the way."""
    replicas = swarm([1.0] * 30, [1.0] * 20, [1.0] * 20)
    helped = []
    while move := plan(replicas, [1.0] * 3, 1, MOVE_S):
        replicas = moved(replicas, move, [1.0] * 3)
        helped.append(move.target)
    assert {1, 2} == set(helped)
    assert pipeline_rate(replicas, 3) >= 22.0


def test_a_fast_replica_goes_where_the_pipeline_is_slow() -> None:
    replicas = swarm([0.25, 0.25, 1.0], [1.0, 1.0])
    move = plan(replicas, [1.0, 1.0], 1, MOVE_S)
    assert move is not None
    assert (move.source, move.target, move.emergency) == (0, 1, False)
    assert move.peer in ("0-0", "0-1")
    assert pipeline_rate(moved(replicas, move, [1.0, 1.0]), 2) == 5.0


@pytest.mark.parametrize(
    ("replicas", "minimum"),
    [
        (swarm([1.0, 1.0], [1.0, 1.0]), 1),  # balanced
        (
            swarm([1.0, 1.0, 1.0], [1.05, 1.0]),
            1,
        ),  # one more is no gain: the other stage would be the slow one
        (swarm([0.25, 0.25], [1.0, 1.0]), 1),  # one loss from empty would stay
        (swarm([0.1, 0.1, 0.1], [1.0, 1.0]), 3),  # fewer than the spec's minimum would
        (swarm([1.0], []), 1),  # nobody can be spared
    ],
)
def test_the_plan_is_at_rest_where_no_move_helps(replicas: list[Placed], minimum: int) -> None:
    costs = [1.0, 1.0]
    assert plan(replicas, costs, minimum, MOVE_S) is None


def test_an_empty_stage_is_filled_at_once_and_one_loss_from_empty_too() -> None:
    for replicas in (swarm([1.0, 1.0, 1.0], []), swarm([1.0, 1.0, 1.0], [0.1])):
        move = plan(replicas, [1.0, 1.0], 1, MOVE_S)
        assert move is not None
        assert move.emergency
        assert move.target == 1
        assert settled(None, move) == move


def test_other_plans_have_to_win_two_windows_in_a_row() -> None:
    move = Move(PeerId("a"), 0, 1, False, 0.5)
    other = dataclasses.replace(move, peer=PeerId("b"))
    assert settled(None, move) is None
    assert settled(other, move) is None
    assert settled(move, None) is None
    assert settled(move, move) == move


def test_what_nobody_measured_counts_as_usual() -> None:
    replicas = swarm([1.0, 1.0, 0.0, 0.0], [1.0, 0.0])
    move = plan(replicas, [1.0, 1.0], 1, MOVE_S)
    assert move is not None
    assert (move.source, move.target) == (0, 1)


claims = st.tuples(st.integers(0, limits.STAGES - 1) | st.integers(0, 2), st.floats(0.0, 1e9))


@settings(max_examples=200)
@given(claimed=st.lists(claims, max_size=12))
@example(claimed=[(0, 5e-324), (0, 1.0), (0, 1.0), (1, 1.0)])
@example(claimed=[(0, 1.0), (1, 1.0), (limits.STAGES - 1, 1.0)])
def test_no_claim_that_the_wire_admits_breaks_the_plan(claimed: list[tuple[int, float]]) -> None:
    """Each peer plans: one that lies must not end the training of all."""
    replicas = [Placed(PeerId(f"p{n}"), stage, service_s) for n, (stage, service_s) in enumerate(claimed)]
    move = plan(replicas, [1.0, 2.0, 0.5], 1, MOVE_S)
    if move is not None:
        assert max(move.source, move.target) < 3
        assert plan([r for r in replicas if r.stage < 3], [1.0, 2.0, 0.5], 1, MOVE_S) == move


def test_who_claims_to_take_no_time_counts_as_not_measured() -> None:
    honest = swarm([1.0, 1.0, 1.0], [1.0, 1.0])
    for claim in (5e-324, LEAST_SERVICE_S / 2):
        liar = dataclasses.replace(honest[0], service_s=claim)
        unknown = dataclasses.replace(honest[0], service_s=0.0)
        assert plan([liar, *honest[1:]], [1.0] * 2, 1, MOVE_S) == plan(
            [unknown, *honest[1:]], [1.0] * 2, 1, MOVE_S
        )


def test_only_trainers_are_replicas() -> None:
    trainer = Member(peer=PeerId("a"), stages=(0,))
    observer = Member(peer=PeerId("b"), stages=(0,), roles=frozenset({Role.OBSERVER}))
    assert [one.peer for one in placed(SwarmView(PeerId("a"), 0.0, (trainer, observer)))] == ["a"]


def test_replicas_of_a_swarm_known_in_part_stand_for_the_others() -> None:
    known = [Member(peer=PeerId(f"p{n}"), stages=(n % 2,), service_s=1.0) for n in range(6)]
    view = SwarmView(PeerId("p0"), 0.0, tuple(known), {0: 300.0, 1: 30.0}, sampled=True)
    assert view.part() == 6 / 330
    replicas = placed(view)
    assert {one.stage: one.stands_for for one in replicas} == {0: 100.0, 1: 10.0}
    move = plan(replicas, [1.0, 1.0], 1, MOVE_S)
    assert move is not None
    assert (move.source, move.target) == (0, 1)
    assert not move.emergency
    nearly_all = SwarmView(PeerId("p0"), 0.0, tuple(known), {0: 3.0, 1: 4.0}, sampled=True)
    assert nearly_all.part() == 1.0
    assert {one.stands_for for one in placed(nearly_all)} == {1.0}, "sizes are only about so"
    joining = dataclasses.replace(view, sampled=False)  # of a swarm that is to be known whole
    assert joining.part() == 1.0
    assert {one.stands_for for one in placed(joining)} == {1.0}


def test_a_stage_of_which_nobody_is_known_is_not_taken_for_empty() -> None:
    known = tuple(Member(peer=PeerId(f"p{n}"), stages=(0,)) for n in range(6))
    view = SwarmView(PeerId("p0"), 0.0, known, {0: 300.0, 1: 300.0}, sampled=True)
    assert overlooks(view, placed(view))
    assert not overlooks(SwarmView(PeerId("p0"), 0.0, known, {0: 300.0}, sampled=True), placed(view))
    assert not overlooks(SwarmView(PeerId("p0"), 0.0, known), placed(view))


@settings(max_examples=200)
@given(seed=st.integers(0, 1 << 32))
def test_moves_end_and_each_helps_and_never_empties_a_stage(seed: int) -> None:
    rng = random.Random(seed)
    stages, minimum = rng.randint(2, 5), rng.randint(1, 2)
    costs = [rng.uniform(0.5, 2.0) for _ in range(stages)]
    speeds = [2.0 ** rng.uniform(0, 3) for _ in range(rng.randint(stages, 24))]
    replicas = [
        Placed(PeerId(f"p{i}"), stage, costs[stage] / speed)
        for i, speed in enumerate(speeds)
        for stage in [rng.randrange(stages)]
    ]
    for _ in range(100):
        move = plan(replicas, costs, minimum, MOVE_S)
        if move is None:
            break
        left = [r for r in replicas if r.stage == move.source and r.peer != move.peer]
        assert len(left) >= minimum
        before = stage_rates(replicas, stages)
        replicas = moved(replicas, move, costs)
        if not move.emergency:  # rates are rounded to an eighth of an octave
            after = stage_rates(replicas, stages)
            assert after[move.target] > before[move.target]
            assert after[move.source] > before[move.target] * (1 + LEAST_GAP) / 2**0.25
    else:
        pytest.fail(f"no rest after 100 moves: {replicas}")


# -- LEAVE


def test_groups_let_go_one_at_a_time_and_never_too_many() -> None:
    a, b, c = PeerId("a"), PeerId("b"), PeerId("c")
    assert may_leave([b, a], [a, b, c], [], 1) == a
    assert may_leave([b], [a, b, c], [a], 1) == ""
    assert may_leave([b], [b, c], [a], 1) == b  # a has gone
    assert may_leave([b], [b, c], [], 2) == ""
    assert may_leave([], [a, b, c], [], 1) == ""


def test_of_two_that_ask_the_second_is_let_go_after_the_first_has_gone() -> None:
    async def main() -> None:
        async with World(4, round_spec(stages={"minimum_replicas": 2})) as world:
            asking = [asyncio.create_task(node.outer.permission(lambda: False)) for node in world.nodes[:3]]
            await world.rounds(2)
            granted = [task.done() for task in asking]
            assert sum(granted) == 1
            first = world.nodes[granted.index(True)]
            await world.rounds(2)  # it is still here, and contributes
            assert sum(task.done() for task in asking) == 1
            await first.stop()
            world.kill(first)
            await world.rounds(2)
            assert sum(task.done() for task in asking) == 2
            second = next(
                n for n, task in zip(world.nodes, asking, strict=False) if task.done() and n != first
            )
            world.kill(second)
            await world.rounds(3)  # two are left, and that is the minimum
            assert sum(task.done() for task in asking) == 2
            assert world.equal()
            for task in asking:
                task.cancel()

    run(main)


def test_who_was_let_go_and_stays_holds_the_others_up_for_eight_entries_only() -> None:
    async def main() -> None:
        async with World(3) as world:
            one, other, _ = world.nodes
            staying = asyncio.create_task(one.outer.permission(lambda: False))
            await world.rounds(2)
            assert staying.done()
            waiting = asyncio.create_task(other.outer.permission(lambda: False))
            await world.rounds(4)
            assert not waiting.done()
            await world.rounds(6)
            assert waiting.done()

    run(main)


def test_who_was_let_go_and_comes_back_has_to_ask_again() -> None:
    async def main() -> None:
        async with World(3, round_spec(stages={"minimum_replicas": 2})) as world:
            one, other, third = world.nodes
            await asyncio.gather(one.outer.permission(lambda: False), world.rounds(2))
            await one.stop()
            back = world.node(0, incarnation=2)  # before a round could go without it
            await back.start()
            world.kill(third)
            asking = [asyncio.create_task(node.outer.permission(lambda: False)) for node in (back, other)]
            await world.rounds(3)
            assert not any(task.done() for task in asking), "two are left, and that is the minimum"
            await world.node(3).start()
            await world.rounds(2)
            assert sum(task.done() for task in asking) == 1, "nobody is held up for eight entries"
            assert world.equal()
            for task in asking:
                task.cancel()

    run(main)


def test_who_hurries_and_may_not_go_opens_no_round_in_vain() -> None:
    """With nobody making a step it opened 48 in 120 s, all refused; else one after every step of anybody."""

    async def main() -> None:
        async with World(2, round_spec(stages={"minimum_replicas": 2})) as world:
            await world.rounds(1)
            asking = asyncio.create_task(world.nodes[0].outer.permission(lambda: True))

            def opened() -> int:
                return sum(kind == "round-open" for node in world.nodes for kind, _ in node.events)

            before = opened()
            await asyncio.sleep(30.0)
            assert opened() == before, "nobody has made a step, and nobody may go"
            for _ in range(4):
                await world.rounds(1, each=2)  # as many as make one due
            assert opened() == before + 4
            assert not asking.done()
            await world.node(2).start()
            async with asyncio.timeout(5.0):
                await asking  # there are enough now; no steps are waited for

    run(main)
