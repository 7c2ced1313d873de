"""Who is here and alive: everybody finds everybody, and notices death, silence, return and farewell."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from members_world import FAR, Swarm

from shoal.dht.liveness import Liveness
from shoal.protocol.virtual_time import run

ALIVE, SUSPECT, GONE = Liveness.ALIVE, Liveness.SUSPECT, Liveness.GONE
FIVE = range(5)


def now() -> float:
    return asyncio.get_running_loop().time()


def play(swarm: Swarm, story: Coroutine[Any, Any, None]) -> None:
    async def whole() -> None:
        try:
            await story
        finally:
            await swarm.close()

    run(whole())


def test_five_peers_find_each_other_within_two_seconds() -> None:
    swarm = Swarm(1)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE, 2.0)
        for number in FIVE:
            view = swarm.peers[number].view()
            assert view.me == swarm.peer(number)
            assert [member.peer for member in view.members] == sorted(map(swarm.peer, FIVE))
            assert {member.name for member in view.group(1)} == {"p1", "p3"}
            assert swarm.peers[number].health().streams == 4  # one with each, whoever dialled
        await asyncio.sleep(5.0)
        for member in swarm.peers[0].view().members:
            assert member.rtt_s == pytest.approx(0.0 if member.name == "p0" else 0.04, abs=0.005)
        assert {kind for _, _, kind, _, _ in swarm.trace} == {"joined"}

    play(swarm, story())


def test_a_killed_peer_is_gone_at_once_and_for_good() -> None:
    swarm = Swarm(2)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE)
        killed_s = now()
        await swarm.kill(2)
        await swarm.lose(2, 0.5)
        for number in (0, 1, 3, 4):
            assert swarm.events(number, 2, killed_s) == ["suspect", "gone"]
            dead = swarm.peers[number].view().get(swarm.peer(2))
            assert dead is not None
            assert dead.departed
        await asyncio.sleep(120.0)  # its record lapses; the dials that look for it stay in vain
        assert all(swarm.events(number, 2, killed_s) == ["suspect", "gone"] for number in (0, 1, 3, 4))

    play(swarm, story())


def test_a_newcomer_knows_at_once_who_lives_and_who_was_killed_just_before() -> None:
    """Of a pair it is the lower id that dials; but nobody may know of who is new, and the dead dial not."""
    swarm = Swarm(2)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE)
        lowest, *living = sorted(FIVE, key=swarm.peer)
        await swarm.kill(lowest)
        newcomer = max(range(5, 25), key=swarm.peer)
        await swarm.add(newcomer)
        await swarm.peers[newcomer].wait_for(
            lambda view: view.is_gone(swarm.peer(lowest)) and swarm.sees(newcomer, ALIVE) == set(living), 0.6
        )

    play(swarm, story())


def test_a_freeze_of_one_second_costs_nobody_its_place() -> None:
    swarm = Swarm(3)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE)
        await swarm.freeze(1, 1.0)
        await asyncio.sleep(30.0)
        assert "gone" not in {kind for _, _, kind, _, _ in swarm.trace}
        assert all(swarm.sees(number, ALIVE) == set(FIVE) - {number} for number in FIVE)

    play(swarm, story())


def test_a_second_of_round_trip_and_lost_packets_evict_nobody() -> None:
    swarm = Swarm(19, link=FAR)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE, 15.0)
        await asyncio.sleep(300.0)
        assert "gone" not in {kind for _, _, kind, _, _ in swarm.trace}
        assert swarm.peers[0].view().members[1].rtt_s == pytest.approx(1.0, abs=0.6)

    play(swarm, story())


def test_a_frozen_peer_is_suspect_then_gone_then_back() -> None:
    swarm = Swarm(4)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE)
        frozen_s = now()
        await swarm.freeze(1, 6.0)
        await swarm.meet(FIVE, 10.0)
        for number in (0, 2, 3, 4):
            assert swarm.events(number, 1, frozen_s) == ["suspect", "gone", "back"]
        times = {kind: at_s - frozen_s for at_s, by, kind, of, _ in swarm.trace if (by, of) == (0, 1)}
        assert 1.0 < times["suspect"] <= 2.0 + 0.25 + 0.1
        assert 4.0 < times["gone"] <= 5.0 + 0.25 + 0.1

    play(swarm, story())


@pytest.mark.parametrize("length_s", [20.0, 300.0])
def test_a_partition_parts_the_views_and_heals_by_itself(length_s: float) -> None:
    swarm = Swarm(5)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE)
        swarm.part({0, 1}, {2, 3, 4})
        swarm.hub.cut()  # nothing but the links can bring them together again
        await asyncio.sleep(length_s)
        assert swarm.sees(0, ALIVE) == {1}
        assert swarm.sees(0, GONE) == {2, 3, 4}
        assert swarm.sees(2, ALIVE) == {3, 4}
        gone = swarm.peers[0].view().get(swarm.peer(3))
        assert gone is not None
        assert not gone.departed  # silence is not departure
        swarm.heal()
        await swarm.meet(FIVE, 25.0)

    play(swarm, story())


def test_without_the_directory_life_goes_on_and_newcomers_spread_by_gossip() -> None:
    swarm = Swarm(6)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE)
        swarm.hub.cut()
        await asyncio.sleep(1.0)
        settled_s = now()
        await asyncio.sleep(600.0)
        assert not [event for event in swarm.trace if event[0] > settled_s]
        health = swarm.peers[0].health().roster
        assert health.lookup_failures > 10
        assert health.publish_failures > 10
        assert "cut off" in health.lookup_error
        await swarm.add(5)
        await swarm.peers[5].learn((swarm.peers[0].own_record()[0],), "the join token")
        await swarm.meet(range(6), 5.0)

    play(swarm, story())


def test_a_revocation_reaches_all_and_shuts_the_peer_out() -> None:
    swarm = Swarm(7)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE)
        revoked_s = now()
        swarm.revoke(1, 3)
        rest = (0, 1, 2, 4)
        await swarm.all(rest, lambda view: view.get(swarm.peer(3)) is None, 2.0)
        await asyncio.sleep(60.0)
        for number in rest:
            assert swarm.events(number, 3, revoked_s) == ["left"]
            assert swarm.peers[number].view().get(swarm.peer(3)) is None
            assert swarm.peers[number].health().streams == 3
        assert swarm.sees(3, ALIVE) == set()

    play(swarm, story())


def test_a_farewell_is_heard_at_once_and_the_old_record_brings_nobody_back() -> None:
    swarm = Swarm(8)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE)
        left_s = now()
        await swarm.peers[4].leave("the volunteer needs the machine")
        assert now() - left_s < 0.5
        await swarm.peers[4].close()
        await swarm.meet(range(4), 0.5)
        await asyncio.sleep(60.0)
        for number in range(4):
            assert swarm.events(number, 4, left_s) == ["left"]
            member = swarm.peers[number].view().get(swarm.peer(4))
            assert member is not None
            assert (member.departed, member.reason) == (True, "said goodbye")

    play(swarm, story())


def test_a_restarted_peer_joins_as_a_new_incarnation() -> None:
    swarm = Swarm(9)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE)
        await swarm.kill(2)
        await swarm.lose(2, 0.5)
        again_s = now()
        await swarm.add(2)
        await swarm.meet(FIVE, 5.0)
        for number in (0, 1, 3, 4):
            assert swarm.events(number, 2, again_s) == ["joined"]
            view = swarm.peers[number].view()
            assert not view.is_gone(swarm.peer(2))

    play(swarm, story())


def test_a_change_of_state_is_seen_within_half_a_second() -> None:
    swarm = Swarm(10)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE)
        await asyncio.sleep(3.3)
        swarm.state[1] = "draining"
        swarm.peers[1].changed_now()
        peer = swarm.peer(1)
        await swarm.all(
            FIVE, lambda view: [m.state for m in view.group(1) if m.peer == peer] == ["draining"], 0.5
        )
        assert not any(m.peer == peer for m in swarm.peers[0].view().online(1))

    play(swarm, story())


def test_a_failed_call_makes_a_peer_suspect_at_once_and_a_beat_clears_it() -> None:
    swarm = Swarm(11)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE)
        await asyncio.sleep(3.0)
        swarm.peers[0].suspect(swarm.peer(1), "propagate: no byte for 5 s")
        assert swarm.sees(0, SUSPECT) == {1}
        assert not any(m.peer == swarm.peer(1) for m in swarm.peers[0].view().online(1))
        await swarm.meet(FIVE, 1.5)

    play(swarm, story())


@pytest.mark.timeout(600)  # everybody verifies everybody's record
def test_a_hundred_peers_know_each_other_through_few_streams() -> None:
    swarm = Swarm(12, limit=12, stages=4)
    everybody = range(100)

    async def story() -> None:
        await swarm.add(*everybody)
        await swarm.meet(everybody, 6.0)  # lookups show samples; the rest comes by gossip, a beat a hop
        streams = [swarm.peers[number].health().streams for number in everybody]
        assert max(streams) <= 30, "12 that it chose, and whoever chose it: names decide"
        assert sum(streams) / 100 <= 18

    play(swarm, story())


def test_in_a_large_swarm_neighbours_see_a_death_at_once_and_the_others_in_time() -> None:
    swarm = Swarm(13, limit=5)
    everybody = range(20)

    async def story() -> None:
        await swarm.add(*everybody)
        await swarm.meet(everybody, 10.0)
        await asyncio.sleep(5.0)
        rest = set(everybody) - {7}
        linked = swarm.peers[7].health().streams
        await swarm.kill(7)
        await asyncio.sleep(0.5)
        knowing = sum(swarm.peers[number].view().is_gone(swarm.peer(7)) for number in rest)
        assert knowing == linked
        stranger = next(n for n in rest if not swarm.peers[n].view().is_gone(swarm.peer(7)))
        swarm.peers[stranger].suspect(swarm.peer(7), "a call failed")
        await asyncio.sleep(0.5)
        assert swarm.peers[stranger].view().is_gone(swarm.peer(7))  # it looked for itself
        await swarm.lose(7, 90.0)  # the rest learns when the record lapses
        await swarm.meet(rest)

    play(swarm, story())


def test_a_silent_peer_is_gone_for_a_distant_one_whose_call_failed() -> None:
    swarm = Swarm(14, limit=3)
    everybody = range(12)

    async def story() -> None:
        await swarm.add(*everybody)
        await swarm.meet(everybody, 10.0)
        await asyncio.sleep(5.0)
        swarm.network.freeze(swarm.peer(5))
        await asyncio.sleep(6.0)
        stranger = next(n for n in everybody if n != 5 and not swarm.peers[n].view().is_gone(swarm.peer(5)))
        asked_s = now()
        swarm.peers[stranger].suspect(swarm.peer(5), "a call failed")
        await asyncio.sleep(6.0)
        assert swarm.events(stranger, 5, asked_s) == ["suspect", "gone"]

    play(swarm, story())


def test_a_machine_that_slept_blames_nobody() -> None:
    swarm = Swarm(17)

    async def story() -> None:
        await swarm.add(*FIVE)
        await swarm.meet(FIVE)
        await asyncio.sleep(3.3)
        asyncio.get_running_loop()._now_s += 60.0  # type: ignore[attr-defined]  # nothing ran for a minute
        await asyncio.sleep(10.0)
        assert "gone" not in {kind for _, _, kind, _, _ in swarm.trace}
        assert all(swarm.sees(number, ALIVE) == set(FIVE) - {number} for number in FIVE)

    play(swarm, story())


def test_the_same_seed_gives_the_same_trace() -> None:
    def trace(seed: int) -> list[tuple[float, int, str, int, str]]:
        swarm = Swarm(seed)

        async def story() -> None:
            await swarm.add(*FIVE)
            await swarm.meet(FIVE)
            await swarm.kill(4)
            swarm.part({0}, {1, 2, 3})
            await asyncio.sleep(20.0)
            swarm.heal()
            await swarm.meet(range(4), 30.0)

        play(swarm, story())
        return swarm.trace

    first = trace(15)
    assert len(first) > 30
    assert trace(15) == first
    assert trace(16) != first
