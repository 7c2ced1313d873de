"""A long download of a stage's state fails on the way: it goes on from there, and nobody dies of it."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from checkpoint_world import spec_of, write_stages
from outer_faults import Faults
from outer_world import Keeper, Node, World, inline, round_spec

from shoal.protocol.errors import NotHere, StageEmpty
from shoal.protocol.faults import Action, Arming
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.protocol.transport import Buffer
from shoal.protocol.virtual_time import run
from shoal.training.checkpoint import start
from shoal.training.checkpoint.fetch import fetch_checkpoint
from shoal.training.checkpoint.read import open_checkpoint, verify
from shoal.training.checkpoint.share import Shelf
from shoal.training.model.layout import stage_layout
from shoal.training.outer.messages import Chunk
from shoal.training.outer.service import RECOVER_S, RECOVER_TRIES
from shoal.training.partition import stage_ranges
from shoal.training.spec import RunSpec

BIG = 300_000  # values: two chunks a tensor


def snapshot_spec() -> dict[str, dict[str, object]]:
    """Of which a joiner can only have the snapshot."""
    outer = {"part_bytes": 1 << 18, "snapshot_every": 2, "payload_budget_bytes": 1, "inner_steps": 1}
    return {"outer": dict(outer)}


def chunks_sent(faults: Faults) -> list[Chunk]:
    """From now on, in all."""
    sent: list[Chunk] = []

    def note(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
        if isinstance(header, Chunk):
            sent.append(header)
        return header, payload

    faults.tamper = note
    return sent


async def join(world: World, number: int) -> Node:
    node = world.node(number)
    await node.start()
    world.nodes.append(node)
    return node


def test_a_download_that_fails_once_after_a_long_while_goes_on_from_there() -> None:
    """What was: the one attempt took longer than a joiner looks for a donor, so its failure was the end."""
    faults = Faults()

    async def main() -> None:
        async with World(1, round_spec(**snapshot_spec()), size=BIG, wrap=faults.wrap) as world:
            await world.rounds(2, each=1)
            (donor,) = world.nodes
            faults.arm_also(Arming("chunk.placed", Action.DELAY, seconds=RECOVER_S + 5.0))
            faults.arm_also(Arming("Chunk.sending", Action.DROP, nth=3, who=donor.name))
            sent = chunks_sent(faults)
            joiner = await join(world, 5)
            assert joiner.outer.height == 2
            assert world.equal()
            assert len(sent) <= 6, "what had come was not asked for again"

    run(main)


def test_a_snapshot_that_has_come_is_not_fetched_again_when_what_follows_it_fails() -> None:
    """What was: gigabytes anew, each time that a donor failed amid the few entries after them."""
    faults = Faults()

    async def main() -> None:
        async with World(1, round_spec(**snapshot_spec()), size=BIG, wrap=faults.wrap) as world:
            await world.rounds(3, each=1)
            for _ in range(2):
                faults.arm_also(Arming("PublishedPart.sending", Action.DROP))
            sent = chunks_sent(faults)
            joiner = await join(world, 5)
            assert joiner.outer.height == 3
            assert world.equal()
            assert len(sent) == 4
            assert not joiner.outer._catching_up.ahead(world.group(joiner.name))
            assert joiner.outer._catching_up._jumping.downloads._begun is None, "and it takes no memory then"

    run(main)


def test_a_guardians_copy_that_fails_goes_on_from_there_and_is_tried_less_and_less_often() -> None:
    """What was: the whole snapshot anew every second, for as long as it failed."""
    faults, sent_s = Faults(), list[float]()

    def count(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
        if isinstance(header, Chunk):
            sent_s.append(asyncio.get_running_loop().time())
        return header, payload

    async def main() -> None:
        async with World(1, round_spec(**snapshot_spec()), size=BIG, wrap=faults.wrap) as world:
            await world.rounds(2, each=1)
            faults.tamper = count
            for _ in range(12):
                faults.arm_also(Arming("Chunk.sending", Action.DROP, nth=2, who=world.nodes[0].name))
            keeper = Keeper(world, 1)
            world.keepers.append(keeper)
            await keeper.start()
            assert len(sent_s) <= 12 + 8, "what had come was not asked for again"

    run(main)
    assert sent_s[-1] - sent_s[0] >= 20.0


def test_who_gets_nothing_at_all_tries_several_times_before_it_gives_up() -> None:
    """However long each attempt takes."""
    faults = Faults()

    async def main() -> None:
        async with World(1, round_spec(**snapshot_spec()), size=BIG, wrap=faults.wrap) as world:
            await world.rounds(2, each=1)
            for _ in range(RECOVER_TRIES - 1):
                faults.arm_also(Arming("Manifest.sending", Action.DELAY, seconds=2 * RECOVER_S))
            joiner = await join(world, 5)
            assert joiner.outer.height == 2
            for _ in range(20):
                faults.arm_also(Arming("Manifest.sending", Action.DELAY, seconds=2 * RECOVER_S))
            begun_s = asyncio.get_running_loop().time()
            other = world.node(6)
            with pytest.raises(StageEmpty, match="stage 0"):
                await other.start()
            await other.stop()
            assert asyncio.get_running_loop().time() - begun_s < 5 * RECOVER_S

    run(main)


@pytest.mark.parametrize(
    ("failures", "takes_s", "found"), [(1, 100.0, True), (2, 40.0, True), (99, 1.0, False)]
)
def test_a_checkpoint_to_start_from_that_failed_after_a_long_while_is_fetched_on(
    failures: int, takes_s: float, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: as with snapshots, a fetch that had taken longer than the patience was the only one."""
    tried = 0

    async def fetch(*_: object, **__: object) -> None:
        nonlocal tried
        tried += 1
        await asyncio.sleep(takes_s)
        if tried <= failures:
            raise NotHere("its donor went away")

    def load(*_: object) -> str:
        if tried <= failures:
            raise NotHere("not on this disk")
        return "weights"

    monkeypatch.setattr(start, "fetch_checkpoint", fetch)
    monkeypatch.setattr(start, "_load", load)
    spec = RunSpec.model_validate({"checkpoint": {"start": "ab" * 32}})
    layout = stage_layout(spec, stage_ranges(spec)[0])
    network = MemoryNetwork(random.Random(1))

    async def main() -> None:
        begun_s = asyncio.get_running_loop().time()
        beginning = start.start_state(
            spec,
            layout,
            lambda *_: "weights",
            folders=[],
            fetched=tmp_path,
            transport=network.transport(PeerId("me"), frozenset({Role.TRAINER})),
            peers=lambda: [PeerId("donor")],
            offload=inline,
            event=lambda kind, data: None,
            rng=random.Random(1),
        )
        if found:
            assert await beginning == "weights"
            return
        with pytest.raises(StageEmpty, match="nobody hands it over"):
            await beginning
        assert asyncio.get_running_loop().time() - begun_s < 100.0

    run(main)


def test_donors_that_stand_still_cost_a_joiner_seconds(tmp_path: Path) -> None:
    """What was: they were asked one by one for the manifest, half a minute each, and again for the spec."""
    written = write_stages(tmp_path / "theirs", spec_of(2))
    roles = frozenset({Role.TRAINER})

    async def main() -> None:
        network = MemoryNetwork(random.Random(1))
        donors = [PeerId(f"donor-{number}") for number in range(6)]
        for donor in donors:
            transport = network.transport(donor, roles)
            Shelf([tmp_path / "theirs"], inline).serve(transport)
            await transport.start()
        here = network.transport(PeerId("me"), roles)
        await here.start()
        for donor in donors[:5]:
            network.freeze(donor)
        begun_s = asyncio.get_running_loop().time()
        await fetch_checkpoint(
            here,
            donors,
            bytes.fromhex(written.digest),
            lambda checkpoint: {entry.name for entry in checkpoint.manifest.files},
            tmp_path / "mine",
            inline,
        )
        assert asyncio.get_running_loop().time() - begun_s < 30.0
        verify(open_checkpoint(tmp_path / "mine"))

    run(main)
