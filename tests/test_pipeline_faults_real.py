"""Micro-batches on real processes: whatever is struck, others go on, nothing counts twice, all is counted.

A sample of the matrix, another one each day, and each third day of its downloads and of its moves;
`SHOAL_FAULT_SEED=N` plays one again. All of it: `soak/pipeline_faults.py`.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_replica import Nursery
from fault_table import all_cases as of_rounds
from pipeline_cases import play
from pipeline_group import PipelineGroup, pipeline_spec
from pipeline_table import Blow, Case, all_cases
from transfer_cases import SECTIONS, play_transfer
from transfer_table import Role, Scene, Transfer, all_transfers

from shoal.protocol.faults import PLACES, steps

DRAWN = (Blow.KILL, Blow.FREEZE, Blow.SLOW, Blow.LEAVE)  # a case of each
SCENES = (None, Scene.JOIN, Scene.MOVE)  # by turns


def transfers(scene: Scene, seed: int) -> list[Transfer]:
    """One: it takes as long as some cases of the pipeline."""
    found = [case for case in all_transfers() if case.scene is scene and case.blow in DRAWN]
    return random.Random(seed).sample(found, 1)


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


def test_every_step_is_struck_in_some_matrix() -> None:
    played = {case.point for case in all_cases()} | {case.point for case in all_transfers()}
    played |= {case.point for case in of_rounds()}
    assert [step for step in steps() if step not in played and not step.startswith("test.")] == []


def test_of_the_round_that_lets_a_mover_go_both_ends_are_struck_whoever_leads() -> None:
    """What a leader says to itself passes no point: at which end the mover is says who has to lead."""
    asking = [case for case in all_transfers() if case.asks_to_leave]
    points = {f"{message}.{place}" for message in ("Answer", "Commit") for place in PLACES}
    assert {(case.point, case.role) for case in asking} == set(
        itertools.product(points, (Role.ASKER, Role.BYSTANDER))
    )
    for case in asking:
        at_leader = case.point in ("Answer.received", "Commit.sending", "Commit.sent")
        assert case.asker_leads == ((case.role is Role.ASKER) == at_leader)
        assert case.strikes_who_passes and case.asker_passes == (case.role is Role.ASKER)


def test_a_sample_of_the_matrix_holds(tmp_path: Path, nursery: Nursery) -> None:
    seed = int(os.environ.get("SHOAL_FAULT_SEED") or datetime.date.today().toordinal())
    print(f"seed {seed}")

    scene = SCENES[seed % len(SCENES)]
    spec = pipeline_spec(**SECTIONS[scene]) if scene is not None else None

    async def story() -> None:
        async with PipelineGroup(tmp_path, nursery, spec) as group:
            for case in sample(seed) if scene is None else transfers(scene, seed):
                played = await (play(group, case) if isinstance(case, Case) else play_transfer(group, case))
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
