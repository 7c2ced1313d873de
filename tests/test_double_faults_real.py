"""Two faults at once on real processes: the others commit, all come to equal bits, each step is in once.

`soak/fault_points.py` measures the seconds of the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_doubles import DOUBLES, Double, play_double
from fault_group import FaultGroup
from fault_replica import Nursery


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.mark.parametrize("double", DOUBLES, ids=lambda double: str(double).replace(" ", "-"))
def test_the_others_commit_and_who_was_struck_comes_back(
    tmp_path: Path, nursery: Nursery, double: Double
) -> None:
    async def story() -> None:
        async with FaultGroup(tmp_path, nursery, 5, durable=True) as group:
            await group.rounds(1)
            here = {str(replica) for replica in group.members}
            outcome = await play_double(group, double)
            for replica in group.members:
                if str(replica) in here - {outcome.struck}:
                    status = await replica.ask("status")
                    assert status["outer"]["switches"] == 0, f"{replica} gave its chain up\n{group.story()}"

    asyncio.run(story())
