"""Rounds on real processes: whoever is killed at whatever message, the others commit; who froze replays.

A sample of the points; `soak/fault_points.py` strikes all of them with everything and measures times.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_cases import play
from fault_group import FaultGroup, fault_spec
from fault_outcome import GOAL_BYTES
from fault_replica import Nursery
from fault_table import Case

from shoal.protocol.faults import Action

KILLED_AT = (
    *("Prepare.sent", "Answer.sending", "Go.sent", "Contributing.sent", "ContributedPart.received"),
    *("PublishedPart.sending", "Publishing.sent", "Report.sending", "Commit.sent", "Done.sending"),
)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def test_survivors_of_a_kill_commit_the_round_without_sending_it_again(
    tmp_path: Path, nursery: Nursery
) -> None:
    async def story() -> None:
        async with FaultGroup(tmp_path, nursery, 4) as group:
            for point in KILLED_AT:
                outcome = await play(group, Case(point, Action.KILL))
                assert outcome.bytes_ratio is not None
                # Whoever stands still for long is given up by the others, and that round is sent again.
                assert outcome.bytes_ratio <= GOAL_BYTES or outcome.stalled_s, outcome

    asyncio.run(story())


def test_who_stands_still_in_mid_transfer_is_left_behind_and_replays(
    tmp_path: Path, nursery: Nursery
) -> None:
    size = 1 << 22  # values: 16 MiB, in parts of 1 MiB
    spec = fault_spec(outer={"part_bytes": 1 << 20, "snapshot_every": 100})

    async def story() -> None:
        async with FaultGroup(tmp_path, nursery, 3, spec, size=size) as group:
            await group.rounds(1)
            leader = group.leader()
            frozen = next(replica for replica in group.members if replica is not leader)
            await group.arm("ContributedPart.sent freeze nth=3", frozen)
            await group.step()
            await group.until(lambda: frozen.frozen, "freeze")
            await group.reach(2)
            await group.meet()
            await group.rounds(2)
            await group.assert_equal()
            assert frozen.height == 1
            frozen.signal(signal.SIGCONT)
            await group.reach(4)
            await group.meet()
            await group.rounds(1)
            await group.assert_equal()
            await group.assert_every_step_is_in_once()
            status = await frozen.ask("status")
            assert status["outer"]["caught_up"] >= 2, "it replayed what it missed"
            assert not any("chunks" in method for method in status["bytes_in"]), "it took no snapshot"

    asyncio.run(story())
