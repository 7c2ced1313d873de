"""From a measured uplink to the parts a peer owns: steady claims, fair weights, the same owners in a row."""

from __future__ import annotations

import asyncio
import random

import pytest
from members_world import RUN, Swarm

from shoal.dht.beats import StageBeat
from shoal.protocol import virtual_time
from shoal.protocol.identity import PeerId
from shoal.training.neighbours import group_members
from shoal.training.outer.policy import owners
from shoal.training.uplinks import UNKNOWN, claimed_uplink, group_uplinks

PARTS = 512


def draw(claims: list[float]) -> list[int]:
    peers = [PeerId(f"peer{n}") for n in range(len(claims))]
    return owners(RUN, 0, range(PARTS), peers, group_uplinks(claims))


@pytest.mark.parametrize("seed", range(20))
def test_measurements_that_wobble_by_a_tenth_move_no_part(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    lines = [10 ** rng.uniform(5.0, 9.0) for _ in range(8)]
    claims = [claimed_uplink(line * rng.uniform(0.9, 1.1), UNKNOWN) for line in lines]
    first = draw(claims)
    for _ in range(50):
        claims = [
            claimed_uplink(line * rng.uniform(0.9, 1.1), claim)
            for line, claim in zip(lines, claims, strict=True)
        ]
        assert draw(claims) == first


def test_a_line_that_really_changed_is_claimed_anew() -> None:
    before = claimed_uplink(3e6, UNKNOWN)
    assert before / 2**0.5 <= 3e6 <= before * 2**0.5
    assert claimed_uplink(None, before) == before
    assert claimed_uplink(None, UNKNOWN) == UNKNOWN
    for factor in (0.25, 4.0):
        assert claimed_uplink(3e6 * factor, before) == before * factor


def test_a_faster_line_owns_more_and_a_new_one_moves_few_but_its_own_parts() -> None:
    claims = [1e6, 2e6, 4e6]
    drawn = draw(claims)
    assert [drawn.count(n) / PARTS for n in range(3)] == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=0.06)
    joined = draw([*claims, UNKNOWN])
    moved = sum(now not in (then, 3) for now, then in zip(joined, drawn, strict=True))
    assert moved <= 0.03 * PARTS
    assert joined.count(3) / PARTS == pytest.approx(2 / 9, abs=0.06), "it counts as the median"


def test_weights_of_the_unknown_and_of_boasters() -> None:
    assert group_uplinks([]) == []
    assert group_uplinks([UNKNOWN, UNKNOWN]) == [1.0, 1.0]
    assert group_uplinks([UNKNOWN, 2.0**20]) == [2.0**20, 2.0**20]
    assert group_uplinks([2.0**20, 2.0**21, 2.0**19, UNKNOWN]) == [2.0**20, 2.0**21, 2.0**19, 2.0**20]
    assert group_uplinks([1e12, 2.0**20, 2.0**20, 2.0**14]) == [2.0**23, 2.0**20, 2.0**20, 2.0**14]
    assert group_uplinks([1e6]) == [2.0**20], "rounded, even where its maker did not"
    assert claimed_uplink(1e300, UNKNOWN) <= 1e12, "it must fit into a beat"


def test_a_group_weighs_its_members_by_what_their_beats_say() -> None:
    swarm = Swarm(3, stages=1)
    swarm.uplinks = {1: 2.0**22, 2: 2.0**20}

    async def story() -> None:
        await swarm.add(0, 1, 2, 3)
        await swarm.meet(range(4))
        own = StageBeat(0, uplink_bytes_per_s=2.0**21)
        group = group_members(swarm.peers[0].view(), 1, own)
        assert {member.peer: member.uplink for member in group} == {
            swarm.peer(0): 2.0**21,
            swarm.peer(1): 2.0**22,
            swarm.peer(2): 2.0**20,
            swarm.peer(3): 2.0**21,
        }
        await swarm.close()

    async def limited() -> None:
        async with asyncio.timeout(60):
            await story()

    virtual_time.run(limited())
