"""Watching: how timings for diagnosis come out of beats, in virtual time, through to the snapshot."""

from __future__ import annotations

import asyncio
import dataclasses

from view_peers import World, round_told

from shoal.node.view.diagnosis import WINDOW
from shoal.protocol import virtual_time


def beats(world: World, name: str, *, finished: int, backlog_s: float, service_s: float = 0.1) -> None:
    """What a member's last beat says from now on."""
    member = world.members[name]
    assert member.beat is not None
    beat = dataclasses.replace(member.beat, finished_work=finished, backlog_s=backlog_s)
    world.members[name] = dataclasses.replace(member, beat=beat, service_s=service_s)


def test_a_hung_lane_a_slow_one_and_a_slow_link_are_in_the_owners_verdict() -> None:
    async def scene() -> None:
        world = World(1)
        owner = await world.add("owner", owner=True)
        peers = [await world.add(f"peer{number}") for number in range(7)]
        for second in range(140):
            for number, peer in enumerate(peers):
                hung = number == 2 and second > 90
                beats(
                    world,
                    peer.peer,
                    finished=10 * (90 if hung else second),
                    backlog_s=0.5,
                    service_s=1.0 if number == 3 else 0.1,
                )
                if second % 10 == 0:
                    slow = {"send": {"start_s": 0.0, "s": 6.0 if number == 4 else 0.6}}
                    peer.buffer.add("round", round_told(1 + second // 10, phases=slow))
            await asyncio.sleep(1.0)
        seen = owner.observer.snapshot()
        named = {(finding.kind, finding.peer) for finding in seen.verdict.findings if finding.peer}
        assert named == {("hung", "peer2"), ("slow-compute", "peer3"), ("slow-link", "peer4")}
        assert {row.peer: row.findings for row in seen.peers if row.findings} == {
            "peer2": ("hung",),
            "peer3": ("slow-compute",),
            "peer4": ("slow-link",),
        }
        await world.close()

    virtual_time.run(scene)


def test_a_lane_without_work_is_not_hung() -> None:
    async def scene() -> None:
        world = World(1)
        owner = await world.add("owner", owner=True)
        await world.add("idle")
        beats(world, "idle", finished=5, backlog_s=0.0)
        await asyncio.sleep(15.0 * WINDOW)
        assert not [one for one in owner.observer.snapshot().verdict.findings if one.peer]
        await world.close()

    virtual_time.run(scene)
