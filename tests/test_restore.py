"""A stage that nobody holds any more goes on from the highest checkpoint that is whole, wherever that is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoint_world import KINDS, known, layouts, spec_of, write_stages

from shoal.dht.view import Member, SwarmView
from shoal.protocol import virtual_time
from shoal.protocol.errors import NotHere
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.training.checkpoint.manifest import CHECKPOINTS_FOLDER, DIGEST
from shoal.training.checkpoint.read import Checkpoint
from shoal.training.checkpoint.replica import StageCheckpoints
from shoal.training.checkpoint.restore import Refused, Restored, restore_stage
from shoal.training.checkpoint.share import Shelf, find
from shoal.training.outer.snapshot import Snapshot

TRAINER = frozenset({Role.TRAINER})
ME, OTHER = PeerId("me".ljust(52, "1")), PeerId("other".ljust(52, "1"))
SPEC = spec_of(2)
STAGE = 1


async def offload(function: Callable[..., Any], *arguments: object) -> Any:
    return function(*arguments)


def damage(checkpoint: Checkpoint) -> None:
    """One bit, which only reading finds."""
    path = next(checkpoint.path.glob("layers.3.*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def restored(mine: Path, others: Path, told: list[str]) -> Restored | None:
    """What a peer comes to that has `mine`, beside one that has `others`."""
    found: list[Restored | None] = []

    async def main() -> None:
        network = MemoryNetwork(random.Random(1))
        here, there = network.transport(ME, TRAINER), network.transport(OTHER, TRAINER)
        Shelf([others], offload).serve(there)
        await here.start()
        await there.start()
        found.append(
            await restore_stage(
                SPEC,
                STAGE,
                layouts(SPEC)[STAGE],
                folders=[mine],
                fetched=mine / "restored",
                transport=here,
                peers=[OTHER],
                offload=offload,
                event=lambda kind, _: told.append(kind),
                refused=Refused(),
            )
        )
        await here.close()
        await there.close()

    virtual_time.run(main)
    return found[0]


def require_known(found: Restored | None) -> None:
    assert found is not None
    assert found.snapshot.anchor.equal(known(layouts(SPEC)[STAGE], KINDS[0]))


def test_a_damaged_checkpoint_does_not_hide_the_whole_one_beside_it(tmp_path: Path) -> None:
    first, _ = write_stages(tmp_path, SPEC), write_stages(tmp_path, SPEC)
    damage(first)
    told: list[str] = []
    require_known(restored(tmp_path, tmp_path / "none", told))
    assert told == ["checkpoint-refused"], "and its owner hears of it"


def test_a_damaged_checkpoint_does_not_hide_what_others_have(tmp_path: Path) -> None:
    damage(write_stages(tmp_path / "mine", SPEC))
    write_stages(tmp_path / "theirs", SPEC)
    require_known(restored(tmp_path / "mine", tmp_path / "theirs", []))


def test_what_others_cannot_hand_over_does_not_hide_what_is_here(tmp_path: Path) -> None:
    write_stages(tmp_path / "mine", SPEC, "stage-1", range(1, 2))
    damage(write_stages(tmp_path / "theirs", SPEC))
    require_known(restored(tmp_path / "mine", tmp_path / "theirs", []))


def test_where_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    damage(write_stages(tmp_path / "mine", SPEC))
    damage(write_stages(tmp_path / "theirs", SPEC))
    told: list[str] = []
    assert restored(tmp_path / "mine", tmp_path / "theirs", told) is None
    assert told == ["checkpoint-refused"] * 2


def test_what_cannot_be_read_hides_no_checkpoint_behind_it(tmp_path: Path) -> None:
    """A folder that is being removed, or another user's."""
    (tmp_path / "000000-odd" / DIGEST).mkdir(parents=True)
    wanted = write_stages(tmp_path, SPEC)
    assert find([tmp_path], wanted.digest) == wanted.path
    with pytest.raises(NotHere):
        find([tmp_path], "0" * 64)


def test_an_older_one_of_a_peer_whose_newest_is_damaged_is_found(tmp_path: Path) -> None:
    """It offered the newest alone, and the stage was lost with a whole checkpoint there."""
    write_stages(tmp_path / "theirs", SPEC, height=2)
    damage(write_stages(tmp_path / "theirs", SPEC, height=4))
    told: list[str] = []
    require_known(restored(tmp_path / "mine", tmp_path / "theirs", told))
    assert told == ["checkpoint-refused"]


def test_who_looks_again_and_again_tells_of_the_same_damage_once(tmp_path: Path) -> None:
    """Whoever waits for a lost stage looks every two seconds: its owner kept 1,024 events of that."""
    damage(write_stages(tmp_path / CHECKPOINTS_FOLDER, SPEC))
    told: list[str] = []
    members: Any = SimpleNamespace(view=lambda: SwarmView(ME, 0.0, ()))
    outer: Any = SimpleNamespace(height=0)

    async def main() -> None:
        checkpoints = StageCheckpoints(
            SPEC,
            STAGE,
            layouts(SPEC)[STAGE],
            transport=MemoryNetwork(random.Random(1)).transport(ME, TRAINER),
            members=members,
            folder=tmp_path,
            imported=(),
            offload=offload,
            event=lambda kind, _: told.append(kind),
            rng=random.Random(1),
        )
        for _ in range(3):
            await checkpoints.restore(outer)

    virtual_time.run(main)
    assert told == ["checkpoint-refused"]


def test_who_looks_again_and_again_reads_the_same_damage_ever_more_rarely(tmp_path: Path) -> None:
    """Every two seconds all of a damaged checkpoint was read again, and fetched again where a peer had it."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    own = write_stages(mine / CHECKPOINTS_FOLDER, SPEC, height=4)
    whole = {path: path.read_bytes() for path in own.path.glob("*")}
    damage(own)
    damage(write_stages(theirs, SPEC, height=2))
    loads: list[str] = []
    resumed: list[int] = []

    async def counting(function: Callable[..., Any], *arguments: object) -> Any:
        if function.__name__ in ("_load", "_begin"):
            loads.append(function.__name__)
        return function(*arguments)

    async def resume(snapshot: Snapshot) -> None:
        resumed.append(snapshot.height)

    members: Any = SimpleNamespace(view=lambda: SwarmView(ME, 0.0, (Member(peer=OTHER),)))
    outer: Any = SimpleNamespace(height=0, resume=resume)

    async def main() -> None:
        network = MemoryNetwork(random.Random(1))
        here, there = network.transport(ME, TRAINER), network.transport(OTHER, TRAINER)
        Shelf([theirs], offload).serve(there)
        await here.start()
        await there.start()
        checkpoints = StageCheckpoints(
            SPEC,
            STAGE,
            layouts(SPEC)[STAGE],
            transport=here,
            members=members,
            folder=mine,
            imported=(),
            offload=counting,
            event=lambda kind, data: None,
            rng=random.Random(1),
        )
        for _ in range(300):
            await checkpoints.restore(outer)
            await asyncio.sleep(2.0)
        assert loads.count("_load") <= 10
        assert loads.count("_begin") <= 10
        for path, data in whole.items():  # somebody mends it
            path.write_bytes(data)
        for _ in range(150):
            await checkpoints.restore(outer)
            await asyncio.sleep(2.0)
        assert resumed
        await here.close()
        await there.close()

    virtual_time.run(main)
