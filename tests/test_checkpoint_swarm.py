"""Checkpoints of a live swarm: written beside training, gathered from all stages, begun from by others."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from checkpoint_world import layouts, spec_of, write_stages
from outer_faults import Faults
from slow_disk import SlowDisk
from trainer_world import RandomFeed, Replica, TrainerWorld, round_spec

from shoal.protocol import virtual_time
from shoal.protocol.errors import NotHere, StageEmpty, StorageError
from shoal.protocol.faults import Action, Arming
from shoal.protocol.identity import PeerId
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.protocol.transport import Buffer, Channel, Stream, Transport
from shoal.training.checkpoint import gather
from shoal.training.checkpoint.fetch import fetch_files
from shoal.training.checkpoint.gather import Gatherer
from shoal.training.checkpoint.keeper import Keeper
from shoal.training.checkpoint.manifest import SPEC, FileEntry, numbered
from shoal.training.checkpoint.messages import CHUNK_BYTES, FileChunk, FileOf, Newest, NewestOf
from shoal.training.checkpoint.read import Checkpoint, open_checkpoint, verify
from shoal.training.checkpoint.reshape import load_stage
from shoal.training.checkpoint.restore import Refused, restore_stage
from shoal.training.checkpoint.share import FILE_METHOD, MANIFEST_METHOD, NEWEST_METHOD, Shelf
from shoal.training.model.layout import stage_layout
from shoal.training.outer.context import GROUP_ROLES, Offload
from shoal.training.spec import RunSpec


def adam_spec(stages: int, **checkpoint: object) -> RunSpec:
    spec = round_spec(stages, outer={"fragments": 2}, optimizer="adamw", learning_rate=0.01)
    return RunSpec.model_validate(spec.model_dump() | {"checkpoint": {"every_s": 0.0, **checkpoint}})


async def _inline(function: object, *arguments: object) -> object:
    assert callable(function)
    return function(*arguments)


def gatherer(world: TrainerWorld, by: Replica, folder: Path, offload: Offload = _inline) -> Gatherer:
    return Gatherer(
        world.spec,
        transport=by.trainer._transport,
        replicas=lambda stage: [member.peer for member in by.members.view().online(stage)],
        folder=folder,
        offload=offload,
        event=lambda kind, data: by.events.append((0.0, kind, data)),
        rng=random.Random(1),
    )


def keeper_of(replica: Replica) -> Keeper:
    checkpoints = replica.trainer._checkpoints
    assert checkpoints is not None
    assert checkpoints.keeper is not None
    return checkpoints.keeper


def whole_state(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every parameter's weights and outer momentum."""
    layout = stage_layout(checkpoint.spec, range(checkpoint.spec.model.layers))
    state = load_stage(checkpoint, checkpoint.spec, layout)
    found = {}
    for slot in layout.slots:
        found[slot.name] = slot.view(state.weights).numpy().tobytes()
        found[f"{slot.name}/momentum"] = slot.view(state.momentum).numpy().tobytes()
    return found


def state_of(group: list[Replica]) -> dict[str, bytes]:
    """The same of replicas, one a stage."""
    found = {}
    for replica in group:
        outer = replica.trainer.outer
        for slot in replica.trainer.layout.slots:
            found[slot.name] = slot.view(outer.anchor).numpy().tobytes()
            found[f"{slot.name}/momentum"] = slot.view(outer.momentum).numpy().tobytes()
    return found


async def trained(world: TrainerWorld, stages: int, height: int, replicas: int = 1) -> None:
    for number in range(stages * replicas):
        await world.add(number, number % stages)
    await world.heights(height)


async def stand_still(world: TrainerWorld) -> None:
    for replica in world.replicas.values():
        if replica.task is not None:
            replica.task.cancel()
            await asyncio.gather(replica.task, return_exceptions=True)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_gathered_checkpoint_is_the_swarm_s_state_under_one_vector_of_heads(
    tmp_path: Path, stages: int
) -> None:
    async def main() -> None:
        async with TrainerWorld(adam_spec(stages), disk=tmp_path) as world:
            await trained(world, stages, 4, replicas=2)
            while not all(r.trainer.weights.inner_steps for r in world.replicas.values()):
                await asyncio.sleep(0.1)  # virtual; whoever gives a stage has moments then
            seen: list[tuple[int, int]] = []
            checkpoint = await gatherer(world, world.replicas[0], tmp_path / "all").gather(
                lambda done, total: seen.append((done, total))
            )
            verify(checkpoint)
            assert checkpoint.whole
            assert seen[-1][0] == seen[-1][1] > 0
            assert len(checkpoint.manifest.parts) == stages
            for part in checkpoint.manifest.parts:
                assert part.height >= 4
                assert part.inner_steps > 0
                heads = {r.trainer.outer.head.hex(): r for r in world.group(part.stage)}
                if part.head in heads:  # nobody made a round since
                    assert heads[part.head].trainer.outer.state_root.hex() == part.state_root
            await world.heights(6)

    virtual_time.run(main)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2), (2, 2)])
def test_a_run_starts_from_a_checkpoint_cut_otherwise_and_goes_on(
    tmp_path: Path, before: int, after: int
) -> None:
    """P7: bit-equal at the start; counters and data positions go on; every peer gets its stage from peers."""

    async def save() -> Checkpoint:
        async with TrainerWorld(adam_spec(before), disk=tmp_path / "before") as world:
            await trained(world, before, 5)
            await stand_still(world)
            checkpoint = await gatherer(world, world.replicas[0], tmp_path / "store").gather()
            assert whole_state(checkpoint) == state_of(list(world.replicas.values()))
            assert world.replicas[0].trainer.outer.tokens == checkpoint.manifest.log_tokens > 0
            return checkpoint

    checkpoint = virtual_time.run(save)

    async def start() -> None:
        spec = adam_spec(after, start=checkpoint.digest)
        async with TrainerWorld(spec, disk=tmp_path / "after") as world:
            feed = RandomFeed(spec, 0)
            await world.add(0, 0, feed, run=False, imported=tmp_path / "store")
            for number in range(1, after):
                await world.add(number, number, run=False)
            group = list(world.replicas.values())
            assert state_of(group) == whole_state(checkpoint)
            for replica in group:
                outer = replica.trainer.outer
                assert (outer.height, outer.tokens) == (0, checkpoint.manifest.log_tokens)
                weights = replica.trainer.weights
                moments = await weights.moments(_inline)
                stored = load_stage(checkpoint, spec, replica.trainer.layout).moments
                assert moments is not None
                assert stored is not None
                assert moments.steps == stored.steps > 0
                assert torch.equal(moments.mean, stored.mean)
                assert torch.equal(moments.square, stored.square)
            assert min(feed.reads().values()) > 0, (
                "a stream goes on behind what the run before had read of it"
            )
            for replica in group:
                replica.task = asyncio.create_task(replica.trainer.run())
            await world.heights(3)
            first = world.group(0)[0].trainer
            assert first.outer.tokens > checkpoint.manifest.log_tokens
            for stage in range(after):
                await world.add(10 + stage, stage)
            await world.kill(0)  # the owner vanishes: whoever comes gets the start from those who are there
            joiner = await world.add(20, 0)
            await world.heights(max(r.trainer.outer.height for r in world.group(0)) + 2)
            assert joiner.heard("start-fetched")

    virtual_time.run(start)


# --- beside training


def test_each_peer_writes_its_stage_from_time_to_time_and_keeps_a_few(tmp_path: Path) -> None:
    async def main() -> None:
        async with TrainerWorld(adam_spec(2, every_s=5.0, kept=2), slower=8.0, disk=tmp_path) as world:
            await trained(world, 2, 1)
            await asyncio.sleep(31.0)
            for number, replica in world.replicas.items():
                assert len(replica.heard("checkpoint")) == 6
                kept = [path for _, path in numbered(tmp_path / str(number) / "checkpoints")]
                assert [path.name for path in kept] == [f"{n:06d}-stage-{number}" for n in (5, 6)]
                for path in kept:
                    verify(open_checkpoint(path))
                assert replica.trainer.status()["checkpoint"]["path"] == str(kept[-1])  # type: ignore[index]

    virtual_time.run(main)


def test_nothing_new_is_not_written_again(tmp_path: Path) -> None:
    """A driver whose next stage is empty makes no rounds. (It once looked again without ever pausing.)"""

    async def main() -> None:
        async with TrainerWorld(adam_spec(2, every_s=1.0), disk=tmp_path) as world:
            replica = await world.add(0, 0)
            await asyncio.sleep(20.0)
            assert len(replica.heard("checkpoint")) == 1

    virtual_time.run(main)


@contextmanager
def disk_of(most_bytes: int) -> Iterator[None]:
    """Files that reach this size are refused by the kernel, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_training_goes_on_untouched(tmp_path: Path) -> None:
    async def main() -> None:
        async with TrainerWorld(adam_spec(1), disk=tmp_path) as world:
            replica = await world.add(0, 0)
            await world.heights(2)
            keeper = keeper_of(replica)
            before = await keeper.take()
            height = replica.trainer.outer.height
            await world.heights(height + 1)
            with disk_of(4096), pytest.raises(StorageError, match="as they were"):
                await keeper.take()
            assert "File too large" in str(replica.heard("checkpoint-refused")[-1]["why"])
            assert "File too large" in str(keeper.status()["refused"])
            verify(before)
            assert [path.name for path in keeper.folder.iterdir()] == [before.path.name]
            await world.heights(height + 3)
            after = await keeper.take()
            assert after.manifest.parts[0].height >= height + 3

    virtual_time.run(main)


@pytest.mark.parametrize("point", ["checkpoint.writing", "checkpoint.sealing"])
@pytest.mark.parametrize("nth", [1, 2])
def test_who_is_killed_while_it_writes_comes_back_with_the_moments_of_the_one_before(
    tmp_path: Path, point: str, nth: int
) -> None:
    faults = Faults()

    async def main() -> None:
        async with TrainerWorld(adam_spec(1), disk=tmp_path, wrap=faults.wrap) as world:
            await world.add(0, 0)
            victim = await world.add(1, 0)
            await world.heights(2)
            before = await keeper_of(victim).take()
            moments = load_stage(before, world.spec, victim.trainer.layout).moments
            await world.heights(victim.trainer.outer.height + 1)
            faults.arm_also(Arming(point, Action.KILL, nth=nth if "writing" in point else 1, who=victim.peer))
            writing = asyncio.create_task(keeper_of(victim).take())
            await asyncio.sleep(0.5)
            assert faults.hit == victim.peer
            await world.kill(1)
            writing.cancel()
            folder = tmp_path / "1" / "checkpoints"
            assert [path.name for _, path in numbered(folder)] == [before.path.name]
            verify(open_checkpoint(before.path))
            again = await world.add(1, 0, run=False)
            restored = await again.trainer.weights.moments(_inline)
            assert restored is not None
            assert moments is not None
            assert restored.steps == moments.steps
            assert torch.equal(restored.square, moments.square)
            assert torch.equal(restored.mean, moments.mean)
            again.task = asyncio.create_task(again.trainer.run())
            await keeper_of(again).take()
            names = sorted(path.name for path in folder.iterdir())
            assert names == ["000001-stage-0", "000002-stage-0"], "what was begun is cleared away"

    virtual_time.run(main)


# --- from peers that die, lie, or stand still


def test_gathering_goes_to_the_next_replica_when_one_dies(tmp_path: Path) -> None:
    faults = Faults()

    async def main() -> None:
        async with TrainerWorld(adam_spec(2), disk=tmp_path, wrap=faults.wrap) as world:
            await trained(world, 2, 2, replicas=2)
            await world.replicas[0].members.wait_for(lambda view: len(view.online(1)) == 2, 15.0)

            def strike(peer: PeerId) -> None:
                faults.disarm()  # whichever of the two is asked first
                world.network.kill(peer)

            for replica in world.group(1):
                faults.arm_also(Arming("FileChunk.sent", Action.KILL, nth=3, who=replica.peer), strike)
            checkpoint = await gatherer(world, world.replicas[0], tmp_path / "all").gather()
            assert faults.hit is not None
            verify(checkpoint)
            assert checkpoint.whole
            assert str(faults.hit) not in {part.peer for part in checkpoint.manifest.parts}

    virtual_time.run(main)


def test_gathering_that_is_cancelled_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    async def main() -> None:
        async with TrainerWorld(adam_spec(1), disk=tmp_path) as world:
            await trained(world, 1, 2)
            for at_s in (0.05, 0.15, 0.45, 0.75):
                disk, folder = SlowDisk(itertools.repeat(0.1)), tmp_path / f"all {at_s}"
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(at_s):
                        await gatherer(world, world.replicas[0], folder, disk.offload).gather()
                await disk.still()
                assert os.listdir(folder) == []

    virtual_time.run(main)


def lies(faults: Faults, liars: set[PeerId]) -> None:
    def tamper(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
        if peer in liars and isinstance(header, FileChunk) and payload:
            return header, bytes(payload)[:-1] + bytes([bytes(payload)[-1] ^ 1])
        return header, payload

    faults.tamper = tamper


def test_gathering_goes_to_the_next_replica_when_one_lies(tmp_path: Path) -> None:
    faults = Faults()

    async def main() -> None:
        async with TrainerWorld(adam_spec(1), disk=tmp_path, wrap=faults.wrap) as world:
            await trained(world, 1, 2, replicas=2)
            liar, honest = world.replicas[0], world.replicas[1]
            lies(faults, {liar.peer})
            for _ in range(3):  # the order of replicas is drawn
                checkpoint = await gatherer(world, honest, tmp_path / "all").gather()
                verify(checkpoint)
                assert checkpoint.manifest.parts[0].peer == honest.peer
            lies(faults, {liar.peer, honest.peer})
            kept = list((tmp_path / "all").iterdir())
            with pytest.raises(StageEmpty, match="does not fit its hash"):
                await gatherer(world, honest, tmp_path / "all").gather()
            assert list((tmp_path / "all").iterdir()) == kept, "nothing of it stays"

    virtual_time.run(main)


def test_a_donor_that_drips_is_left_for_another(tmp_path: Path) -> None:
    """A byte a second is never silent, and at that rate nobody would ever have a checkpoint."""
    data = random.Random(1).randbytes(CHUNK_BYTES + 1000)

    async def main() -> None:
        network = MemoryNetwork(1)
        drips, honest, asks = (network.transport(PeerId(name)) for name in ("drips", "honest", "asks"))

        def serve(donor: Transport, step_bytes: int, pause_s: float) -> None:
            async def give(stream: Stream) -> None:
                await stream.receive(FileOf)
                for offset in range(0, len(data), step_bytes):
                    await stream.send(FileChunk(offset), data[offset : offset + step_bytes])
                    await asyncio.sleep(pause_s)

            donor.serve(FILE_METHOD, give, GROUP_ROLES, Channel.BULK)

        serve(drips, 1, 1.0)
        serve(honest, CHUNK_BYTES, 0.0)
        for transport in (drips, honest, asks):
            await transport.start()
        entry = FileEntry(name="file", size=len(data), blake3=blake3(data).hexdigest())
        async with asyncio.timeout(60.0):
            job = (entry, tmp_path / "file")
            await fetch_files(asks, [drips.me, honest.me], bytes(32), [job], _inline)
        assert job[1].read_bytes() == data
        with disk_of(CHUNK_BYTES), pytest.raises(StorageError, match="free space there"):
            await fetch_files(asks, [honest.me], bytes(32), [(entry, tmp_path / "other")], _inline)
        assert os.listdir(tmp_path) == ["file"], "half a file takes room, and is of no use to anybody"
        for transport in (drips, honest, asks):
            await transport.close()

    virtual_time.run(main)


def test_gathering_goes_to_the_next_replica_when_one_never_ends_writing(tmp_path: Path) -> None:
    """It says every second that it is at it: others must not wait for that for ever, nor any later one."""

    async def main() -> None:
        async with TrainerWorld(adam_spec(1), disk=tmp_path) as world:
            await trained(world, 1, 2, replicas=2)

            async def take() -> Checkpoint:
                await asyncio.Event().wait()
                raise AssertionError

            for slow, honest in itertools.permutations((world.replicas[0], world.replicas[1])):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(keeper_of(slow), "take", take)
                    patch.setattr(gather, "TAKE_S", 20.0)
                    async with asyncio.timeout(40.0):
                        checkpoint = await gatherer(world, honest, tmp_path / "all").gather()
                assert checkpoint.manifest.parts[0].peer == honest.peer

    virtual_time.run(main)


def test_a_lost_stage_takes_no_byte_of_what_another_model_would_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who offers it may say that it is of this run; how large its files are, its own spec says."""
    own, huge = spec_of(1), spec_of(1, width=256)
    other = write_stages(tmp_path / "shelf", huge)
    refusals: list[str] = []

    async def main() -> None:
        network = MemoryNetwork(1)
        liar, asks = network.transport(PeerId("liar")), network.transport(PeerId("asks"))
        shelf = Shelf([tmp_path / "shelf"], _inline)

        async def newest(stream: Stream) -> None:
            below = (await stream.receive(NewestOf)).header.below
            if below:
                raise NotHere("nothing older")
            await stream.send(Newest(bytes.fromhex(other.digest), 99))

        liar.serve(NEWEST_METHOD, newest, GROUP_ROLES)
        liar.serve(MANIFEST_METHOD, shelf._manifest, GROUP_ROLES, Channel.BULK)
        liar.serve(FILE_METHOD, shelf._file, GROUP_ROLES, Channel.BULK)
        opened: list[str] = []
        given = shelf._open

        def note(digest: bytes, name: str) -> object:
            opened.append(name)
            return given(digest, name)

        monkeypatch.setattr(shelf, "_open", note)
        for transport in (liar, asks):
            await transport.start()
        found = await restore_stage(
            own,
            0,
            layouts(own)[0],
            folders=[],
            fetched=tmp_path / "fetched",
            transport=asks,
            peers=[liar.me],
            offload=_inline,
            event=lambda kind, data: refusals.append(f"{kind} {data['why']}"),
            refused=Refused(),
        )
        assert found is None
        assert set(opened) == {SPEC}
        assert "another run" in refusals[0]
        for transport in (liar, asks):
            await transport.close()

    virtual_time.run(main)


def test_a_start_is_fetched_from_who_tells_the_truth_or_not_at_all(tmp_path: Path) -> None:
    faults = Faults()

    async def save() -> Checkpoint:
        async with TrainerWorld(adam_spec(1), disk=tmp_path / "before") as world:
            await trained(world, 1, 2)
            return await gatherer(world, world.replicas[0], tmp_path / "store").gather()

    checkpoint = virtual_time.run(save)
    spec = adam_spec(1, start=checkpoint.digest)

    async def start() -> None:
        async with TrainerWorld(spec, disk=tmp_path / "after", wrap=faults.wrap) as world:
            first = await world.add(0, 0, run=False, imported=tmp_path / "store")
            second = await world.add(1, 0, run=False, imported=tmp_path / "store")
            lies(faults, {first.peer})
            third = await world.add(2, 0, run=False)
            assert state_of([third]) == whole_state(checkpoint)
            lies(faults, {first.peer, second.peer, third.peer})
            with pytest.raises(StageEmpty, match="nobody hands it over"):
                await world.add(3, 0, run=False)

    virtual_time.run(start)


def test_a_fetched_start_that_was_damaged_since_is_fetched_again(tmp_path: Path) -> None:
    async def save() -> Checkpoint:
        async with TrainerWorld(adam_spec(1), disk=tmp_path / "before") as world:
            await trained(world, 1, 2)
            return await gatherer(world, world.replicas[0], tmp_path / "store").gather()

    checkpoint = virtual_time.run(save)

    async def start() -> None:
        spec = adam_spec(1, start=checkpoint.digest)
        async with TrainerWorld(spec, disk=tmp_path / "after") as world:
            await world.add(0, 0, run=False, imported=tmp_path / "store")
            await world.add(1, 0, run=False)
            await world.kill(1)
            (file,) = (tmp_path / "after" / "1" / "start").glob("*/layers.0.attention.q.safetensors")
            data = bytearray(file.read_bytes())
            data[-3] ^= 4
            file.write_bytes(data)
            again = await world.add(1, 0, run=False)
            assert again.heard("start-fetched")
            assert state_of([again]) == whole_state(checkpoint)

    virtual_time.run(start)


# --- a stage that was lost


@pytest.mark.parametrize("height", [5, 8])
def test_a_lost_stage_goes_on_from_the_last_checkpoint_and_says_so(tmp_path: Path, height: int) -> None:
    """Its heights are no multiples of `snapshot_every`, and who comes next finds its way nevertheless."""

    async def main() -> None:
        async with TrainerWorld(adam_spec(2), disk=tmp_path) as world:
            await trained(world, 2, height)
            driver = world.replicas[0]
            folder = tmp_path / "0" / "checkpoints"
            await gatherer(world, driver, folder).gather()
            await world.heights(height + 2)
            checkpoint = await gatherer(world, driver, folder).gather()
            saved = checkpoint.manifest.parts[1]
            await world.heights(saved.height + 1)
            await world.kill(1)
            heir = await world.add(5, 1, run=False)
            (told,) = heir.heard("stage-restored")
            assert (told["height"], told["checkpoint"]) == (saved.height, checkpoint.digest)
            assert heir.trainer.outer.state_root.hex() == saved.state_root
            assert heir.trainer.outer.head.hex() == saved.head
            moments = await heir.trainer.weights.moments(_inline)
            assert moments is not None
            assert moments.steps == saved.inner_steps
            assert not (tmp_path / "5" / "restored").exists()
            heir.task = asyncio.create_task(heir.trainer.run())
            await asyncio.sleep(1.0)
            for number in (6, 7):
                await world.add(number, 1)
            await world.heights(max(r.trainer.outer.height for r in world.replicas.values()) + 2)
            roots = {r.trainer.outer.head: r.trainer.outer.state_root for r in world.group(1)}
            assert all(roots[r.trainer.outer.head] == r.trainer.outer.state_root for r in world.group(1))

    virtual_time.run(main)


def test_a_run_that_has_just_begun_restores_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with TrainerWorld(adam_spec(2), disk=tmp_path) as world:
            await trained(world, 2, 1, replicas=2)
            assert not [r for r in world.replicas.values() if r.heard("stage-restored")]

    virtual_time.run(main)
