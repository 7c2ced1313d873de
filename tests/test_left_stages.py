"""What the disk has of a stage that its peer has left goes in time, unless it may be the last copy."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from outer_world import inline
from test_tenure import at_stages, moving_spec
from trainer_world import TrainerWorld

from shoal.protocol.errors import StorageError
from shoal.protocol.virtual_time import run
from shoal.training.recovery import left_stages
from shoal.training.recovery.left_stages import KEEP_S, KEPT, Left, LeftStages, on_disk, superfluous


def large(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name != "promise")


@pytest.mark.parametrize("others", [3, 1])
def test_the_folder_of_a_stage_that_was_left_goes_when_others_have_it(
    others: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: for ever, a snapshot, its entries and residuals more with each stage that a peer came to."""
    monkeypatch.setattr(left_stages, "KEEP_S", 30.0)
    monkeypatch.setattr(left_stages, "LOOK_S", 5.0)

    async def main() -> None:
        async with TrainerWorld(moving_spec(2), disk=tmp_path, slower=10.0) as world:
            for number in range(4):
                await world.add(number, 0, moves=True)
            await world.add(4, 1, moves=True)
            await at_stages(world, [3, 2])
            (mover,) = (one for one in world.replicas.values() if one.stage and one.number < 4)
            stayed = [one.number for one in world.replicas.values() if not one.stage]
            (folder,) = (tmp_path / str(mover.number)).rglob("stage-0")
            assert large(folder), "who comes back soon needs no download"
            for number in stayed[others:]:
                await world.kill(number)
            if others == 1:
                await asyncio.sleep(45.0)
                assert large(folder), "of one alone nobody knows whether it lives tomorrow"
            else:
                async with asyncio.timeout(60.0):
                    while not mover.heard("left-stage-removed"):
                        await asyncio.sleep(1.0)
                assert not large(folder)
            assert large(folder.parent / "stage-1"), "what it holds stays"

    run(main)


def test_what_cannot_be_removed_is_told_with_what_to_do_and_tried_again_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: every minute, and told to programs alone."""
    tries: list[float] = []

    def refuses(folder: Path) -> None:
        tries.append(asyncio.get_running_loop().time())
        raise StorageError(f"{folder}: Read-only file system; remove it by hand")

    monkeypatch.setattr(left_stages, "forget", refuses)
    monkeypatch.setattr(left_stages.LeftStages, "_has_copies", lambda self, left: True)
    told: list[dict[str, object]] = []

    async def main() -> None:
        context: Any = SimpleNamespace(
            run_id=b"run",
            rng=random.Random(1),
            offload=inline,
            event=lambda kind, fields: told.append(fields),
        )
        folder = tmp_path / context.run_id.hex() / "stage-7"
        folder.mkdir(parents=True)
        (folder / "entry-000000000003.safetensors").touch()
        members: Any = None
        looking = asyncio.create_task(LeftStages(context, members, tmp_path, lambda: True, tuple).run())
        await asyncio.sleep(3.5 * KEEP_S)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)

    run(main, limit_s=1e6)
    assert len(tries) == 3
    assert all("stage 7" in str(fields["text"]) and "by hand" in str(fields["text"]) for fields in told)


def test_of_stages_left_of_late_the_last_ones_stay_for_a_while() -> None:
    left = [Left(stage, 8, float(stage)) for stage in range(5)]
    assert [one.stage for one in superfluous(left, lambda one: True, 5.0)] == list(range(5 - KEPT))
    assert superfluous(left, lambda one: False, 1e9) == []
    assert superfluous(left, lambda one: True, KEEP_S + 5.0) == left
    assert [one.stage for one in superfluous(left[-1:], lambda one: True, KEEP_S)] == []


def test_what_is_no_stage_of_a_run_is_never_looked_at(tmp_path: Path) -> None:
    for name in ("stage-1/snapshot-000000000008.safetensors", "stage-1/entry-000000000009.safetensors",
                 "stage-2/promise", "stage-x/snapshot-000000000008.safetensors",
                 "stage-3/unfinished/.tmpAbc"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert on_disk(tmp_path) == {1: 9, 3: 0}
    assert on_disk(tmp_path / "nothing") == {}
