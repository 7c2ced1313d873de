"""Micro-batches on real processes: whatever is struck, others go on, nothing counts twice, all is counted.

A sample of the matrix, another one each day; `SHOAL_FAULT_SEED=N` plays one again. All of it:
`soak/pipeline_faults.py`.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_replica import Nursery
from pipeline_cases import play
from pipeline_group import PipelineGroup
from pipeline_table import Blow, Case, all_cases

DRAWN = (Blow.KILL, Blow.FREEZE, Blow.SLOW, Blow.LEAVE)  # a case of each


def sample(seed: int) -> list[Case]:
    """Of those that need nothing special beforehand."""
    rng = random.Random(seed)
    plain = [
        case
        for case in all_cases()
        if not (case.needs_slow_hops or case.needs_silent_driver or case.needs_disk or case.tells_lies)
    ]
    return [rng.choice([case for case in plain if case.blow is blow]) for blow in DRAWN]


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


def test_a_sample_of_the_matrix_holds(tmp_path: Path, nursery: Nursery) -> None:
    seed = int(os.environ.get("SHOAL_FAULT_SEED") or datetime.date.today().toordinal())
    print(f"seed {seed}")

    async def story() -> None:
        async with PipelineGroup(tmp_path, nursery) as group:
            for case in sample(seed):
                played = await play(group, case)
                print(played)
                assert played.audit.applied, "micro-batches went through meanwhile"

    asyncio.run(story())


def test_a_stage_that_is_emptied_trains_again(tmp_path: Path, nursery: Nursery) -> None:
    async def story() -> None:
        async with PipelineGroup(tmp_path, nursery) as group:
            played = await play(group, Case("Gradient.sending", Blow.EMPTY, 1))
            assert played.struck.count("w") == len(group.of_stage(1)), "both were killed"
            assert played.audit.applied

    asyncio.run(story())
