"""Joiners spread over the stages without talking to each other."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.dht.liveness import Liveness
from shoal.dht.neighbours import neighbours
from shoal.dht.view import Member, SwarmView
from shoal.protocol import limits
from shoal.protocol.identity import PeerId, Role
from shoal.training.placement import Loads, place, tried

EVEN = (1.0,) * 8  # costs of stages


def member(name: str, *stages: int, state: str = "online", **changes: object) -> Member:
    return Member(peer=PeerId(name), stages=stages, state=state, **changes)  # type: ignore[arg-type]


def view(*members: Member) -> SwarmView:
    return SwarmView(members[0].peer, 0.0, tuple(sorted(members, key=lambda one: one.peer)))


def joiner(name: str, *stages: int) -> Member:
    return member(name, *stages, state="joining")


@pytest.mark.parametrize(
    ("members", "stage"),
    [
        ([], 0),
        ([member("a", 0)], 1),
        ([member("a", 0), member("b", 1)], 2),
        ([member("a", 0), member("b", 1), member("c", 2)], 0),
        ([member("a", 0), member("b", 1), member("c", 2, liveness=Liveness.GONE)], 2),
        ([member("a", 0), member("b", 1), member("c", 2, state="draining")], 2),
        ([member("a", 0), member("b", 1), member("c", 2, roles=frozenset({Role.OBSERVER}))], 2),
        ([member("a", 0), member("b", 1), member("c", 2, liveness=Liveness.SUSPECT)], 0),
        ([member("a", 0), member("b", 1), joiner("c", 2)], 0),
        ([member("a", 0), member("b", 1), joiner("c")], 0),  # c takes 2, then all have one
        ([member("a", 7), member("b", 0)], 1),  # a stage beyond the spec is nobody's
    ],
)
def test_a_joiner_takes_the_neediest_stage(members: list[Member], stage: int) -> None:
    assert place(view(joiner("z"), *members), PeerId("z"), EVEN[:3]) == stage


def test_from_two_replicas_on_the_weakest_stage_is_helped_first() -> None:
    """What they commit is the same at every stage, and says nothing."""
    fast = [member(name, 0, service_s=0.2, tokens_per_s=100.0) for name in "ab"]
    slow = [member(name, 1, service_s=0.9, tokens_per_s=100.0) for name in "cde"]
    assert place(view(joiner("z"), *fast, *slow), PeerId("z"), EVEN[:2]) == 1
    assert place(view(joiner("z"), fast[0], *slow), PeerId("z"), EVEN[:2]) == 0  # one replica: close to empty


def test_a_stage_that_costs_more_needs_more_of_the_same_peers() -> None:
    """Three times the cost: each of its replicas takes three times as long."""
    members = [member("a", 0), member("b", 0), *(member(f"c{n}", 1) for n in range(5))]
    assert place(view(joiner("z"), *members), PeerId("z"), (1.0, 3.0)) == 1
    measured = [member("a", 0, service_s=1.0), member("b", 0, service_s=1.0)]
    measured += [member(f"c{n}", 1, service_s=3.0) for n in range(7)]
    assert place(view(joiner("z"), *measured), PeerId("z"), (1.0, 3.0)) == 0


@pytest.mark.parametrize("seed", range(20))
def test_joiners_that_see_the_same_spread_evenly(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    stages = rng.randint(1, 6)
    newcomers = [joiner(f"j{rng.randrange(10**9)}") for _ in range(rng.randint(1, 24))]
    picture = view(*newcomers)
    chosen = [place(picture, one.peer, EVEN[:stages]) for one in newcomers]
    counts = [chosen.count(stage) for stage in range(stages)]
    assert max(counts) - min(counts) <= 1


def test_of_a_swarm_known_in_part_a_joiner_compares_a_few_stages() -> None:
    """Those drawn for it; and whichever has too few replicas, whoever it is."""
    known = [member(f"m{stage}{n}", stage) for stage in range(8) for n in range(2)]
    sizes = {stage: 100.0 + stage for stage in range(8)}
    names = [f"j{n}" for n in range(200)]
    chosen = {
        name: place(replace(view(joiner(name), *known), sizes=sizes), PeerId(name), EVEN) for name in names
    }
    assert all(chosen[name] == min(tried(PeerId(name), 8)) for name in names)
    assert {tuple(tried(PeerId(name), 8)) for name in names} > {tuple(tried(PeerId("j0"), 8))}
    lonely = [one for one in known if one.peer != "m71"]
    sizes[7] = 1.0
    for name in names[:20]:
        assert place(replace(view(joiner(name), *lonely), sizes=sizes), PeerId(name), EVEN) == 7


@pytest.mark.parametrize("seed", range(3))
def test_stages_whose_size_is_hard_to_tell_do_not_draw_the_joiners(seed: int) -> None:
    """Peers come and go until it is settled; half of the sizes are known within 4 %, half within 14 %."""
    print("seed", seed)

    def excess(few: bool) -> float:
        rng, stages, each = random.Random(seed), 24, 400
        sizes = [each] * stages
        for number in range(12 * each):
            leaves = rng.choices(range(stages), sizes)[0]
            sizes[leaves] -= 1
            loads = Loads([1.0] * stages)
            for stage, size in enumerate(sizes):
                loads.add(stage, 1.0, size * rng.gauss(1.0, 0.14 if stage % 2 else 0.04))
            compared = tried(PeerId(f"j{seed} {number}"), stages) if few else range(stages)
            sizes[loads.neediest(compared)] += 1
        return statistics.fmean(sizes[1::2]) / statistics.fmean(sizes[::2]) - 1.0

    assert excess(few=True) < 0.3 * excess(few=False)


stage_claims = st.lists(st.integers(0, limits.STAGES - 1) | st.integers(0, 2), max_size=8)


@settings(max_examples=200)
@given(claimed=st.lists(st.tuples(stage_claims, st.floats(0.0, 1e9)), max_size=12))
@example(claimed=[([0], 5e-324), ([0], 1.0), ([1], 1.0)])
@example(claimed=[([0], 5e-324), ([1], 5e-324)])
@example(claimed=[([limits.STAGES - 1], 1e9)])
def test_no_claim_that_the_wire_admits_keeps_a_joiner_out(claimed: list[tuple[list[int], float]]) -> None:
    others = [member(f"p{n}", *stages, service_s=claim) for n, (stages, claim) in enumerate(claimed)]
    assert place(view(joiner("z"), *others), PeerId("z"), (1.0, 2.0, 0.5)) in range(3)


@pytest.mark.parametrize("seed", range(20))
def test_noise_in_measured_rates_does_not_part_two_views(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)

    def noisy() -> SwarmView:
        measured = [member(f"m{n}", n % 2, service_s=0.1 * rng.uniform(0.95, 1.05)) for n in range(4)]
        return view(joiner("y"), joiner("z"), *measured)

    assert {place(noisy(), PeerId("y"), EVEN[:2]), place(noisy(), PeerId("z"), EVEN[:2])} == {0, 1}


def test_joiners_that_collided_part_one_at_a_time_and_then_stay() -> None:
    crowd = {name: 1 for name in "xyz"}  # all three announced stage 1, stages 0 and 2 are empty
    for _ in range(5):
        picture = view(*(joiner(name, stage) for name, stage in crowd.items()))
        moves = {name: place(picture, PeerId(name), EVEN[:3]) for name in crowd}
        assert sum(moves[name] != crowd[name] for name in crowd) <= 1
        crowd = moves
    assert sorted(crowd.values()) == [0, 1, 2]


def test_a_gap_of_one_moves_nobody() -> None:
    picture = view(joiner("y", 0), member("a", 0), member("b", 1))
    assert place(picture, PeerId("y"), EVEN[:2]) == 0


def crowd(count: int, stages: int) -> SwarmView:
    return view(*(member(f"p{n:04}", n % stages) for n in range(count)))


def test_in_a_small_swarm_everybody_is_a_neighbour() -> None:
    picture = crowd(33, 2)
    assert neighbours(picture, PeerId("p0000")) == {one.peer for one in picture.members} - {"p0000"}


def test_in_a_large_swarm_neighbours_are_few_useful_and_connected() -> None:
    picture = crowd(400, 4)
    chosen = {one.peer: neighbours(picture, one.peer, 16) for one in picture.members}
    degrees = dict.fromkeys(chosen, 0)
    for peer, others in chosen.items():
        assert len(others) == 16
        stages = [int(other[1:]) % 4 for other in others]
        mine = int(peer[1:]) % 4
        assert stages.count(mine) >= 6
        assert mine == 3 or stages.count(mine + 1) >= 4
        for other in others:
            degrees[other] += other not in chosen or peer not in chosen[other]
    assert max(degrees.values()) <= 32  # streams held by the other side's wish alone
    reached, border = {PeerId("p0000")}, [PeerId("p0000")]
    while border:
        border = [other for peer in border for other in chosen[peer] if other not in reached]
        reached.update(border)
    assert len(reached) == 400


def test_gone_peers_take_no_neighbours_place() -> None:
    dead = [member(f"d{n}", 0, liveness=Liveness.GONE) for n in range(40)]
    assert neighbours(view(member("a", 0), member("b", 1), *dead), PeerId("a"), 4) == {"b"}
