"""Joiners, laggards, forks and restarts: whoever comes reaches byte-equal state and loses no local step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from outer_faults import Faults
from outer_world import Node, World, inline, round_spec

from shoal.protocol.errors import MessageTooLarge, StageEmpty, StorageError
from shoal.protocol.faults import Action, Arming
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Buffer
from shoal.protocol.virtual_time import run
from shoal.training.outer.log import genesis_state
from shoal.training.outer.messages import Chunk, Commit, EntryItem, Manifest, PublishedPart
from shoal.training.outer.parts import cut
from shoal.training.outer.snapshot import snapshot_of
from shoal.training.recovery.download import ask_manifest, download
from shoal.training.recovery.prefetch import prefetch
from shoal.training.recovery.snapshot import chunk_hashes, load
from shoal.training.recovery.snapshots import newest_on_disk, store

BIG = 300_000  # values: two chunks a tensor


async def join(world: World, number: int, incarnation: int = 1, directory: Path | None = None) -> Node:
    node = world.node(number, incarnation, directory)
    await node.start()
    world.nodes.append(node)
    return node


@pytest.mark.parametrize("rounds", [0, 1, 3, 4, 9, 13])
def test_a_joiner_reaches_equal_bits_and_contributes(rounds: int) -> None:
    async def main() -> None:
        async with World(2) as world:
            await world.rounds(rounds)
            joiner = await join(world, 5)
            assert joiner.outer.height == rounds
            assert world.equal()
            assert torch.equal(joiner.weights.weights, joiner.outer.anchor), "it starts from the anchor"
            await world.rounds(2)
            assert world.equal()
            entry = joiner.outer.entry(rounds + 2)
            assert entry is not None
            assert entry.seat_of(joiner.name) in {row.seat for row in entry.contributors}
            world.assert_every_step_is_in_once()

    run(main)


def test_a_joiner_asks_its_donors_before_those_who_may_be_gone() -> None:
    """What was: everybody who had been in a round was asked for its parts in random order, and each who did
    not answer any more took a moment, for every part."""

    async def main() -> None:
        async with World(5) as world:
            await world.rounds(3)
            for node in world.nodes[1:4]:
                world.freeze(node)
            await asyncio.sleep(5.0)
            async with asyncio.timeout(1.0):
                joiner = await join(world, 5)
            assert joiner.outer.height == 3

    run(main)


@pytest.mark.parametrize("rounds", [3, 5, 9, 13])
def test_a_joiner_has_the_newest_snapshot_of_the_others_and_so_serves_their_version(rounds: int) -> None:
    async def main() -> None:
        async with World(2) as world:
            await world.rounds(rounds)
            joiner = await join(world, 5)
            newest: dict[PeerId, tuple[bytes, torch.Tensor]] = {}

            def watch(node: Node) -> None:
                node.outer.watch_snapshots(
                    lambda kept: newest.update({node.name: (kept.state.head, kept.anchor)})
                )

            watch(world.nodes[0])
            watch(joiner)
            for _ in range(2):
                (head, anchor), (other, same) = newest.values()
                assert head == other
                assert torch.equal(anchor, same)
                await world.rounds(4)  # past the next one
            assert newest[joiner.name][0] != head

    run(main)


def big_spec() -> dict[str, dict[str, object]]:
    return {
        "outer": {"part_bytes": 1 << 18, "snapshot_every": 2, "payload_budget_bytes": 1, "inner_steps": 1}
    }


def test_snapshot_comes_from_several_donors_and_survives_the_death_of_one() -> None:
    faults = Faults()

    async def main() -> None:
        async with World(3, round_spec(**big_spec()), size=BIG, wrap=faults.wrap) as world:
            await world.rounds(3, each=1)
            faults.arm(
                Chunk, "after", lambda peer: world.kill(next(n for n in world.nodes if n.name == peer))
            )
            joiner = await join(world, 5)
            assert faults.hit is not None
            assert joiner.outer.height == 3
            assert world.equal()
            assert any(kind == "replay-impossible" for kind, _ in joiner.events)

    run(main)


@pytest.mark.parametrize("kind", [Manifest, EntryItem, Chunk, PublishedPart], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("point", ["before", "after"])
def test_a_donor_that_dies_is_replaced(kind: type, point: str) -> None:
    faults = Faults()

    async def main() -> None:
        async with World(3, round_spec(**big_spec()), size=BIG, wrap=faults.wrap) as world:
            await world.rounds(3, each=1)
            faults.arm(kind, point, lambda peer: world.kill(next(n for n in world.nodes if n.name == peer)))
            await join(world, 5)
            assert faults.hit is not None
            assert world.equal()
            await world.rounds(2)
            assert world.equal()

    run(main)


@pytest.mark.parametrize("kind", [Manifest, EntryItem, Chunk, PublishedPart], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dies", [True, False], ids=["killed", "frozen"])
def test_two_donors_that_fail_one_after_the_other_are_replaced(kind: type, dies: bool) -> None:
    faults, struck = Faults(), list[PeerId]()

    async def main() -> None:
        async with World(4, round_spec(**big_spec()), size=BIG, wrap=faults.wrap) as world:
            await world.rounds(3, each=1)

            def strike(peer: PeerId) -> None:
                if peer not in struck and len(struck) < 2:
                    struck.append(peer)
                    node = next(node for node in world.nodes if node.name == peer)
                    (world.kill if dies else world.freeze)(node)

            def in_mid_transfer(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
                if isinstance(header, kind):
                    asyncio.get_running_loop().call_later(0.0005, strike, peer)
                return header, payload

            faults.tamper = in_mid_transfer
            joiner = await join(world, 9)
            assert len(struck) == 2
            assert joiner.outer.height == 3

    run(main)


def test_donors_that_stand_still_are_waited_for_once(tmp_path: Path) -> None:
    """What was: who had not given the manifest was asked for the chunks first, and waited for again."""

    async def main() -> None:
        async with World(5, round_spec(outer={"snapshot_every": 2})) as world:
            await world.rounds(2)
            asker = world.nodes.pop()
            donors = [node.name for node in world.nodes]
            for node in world.nodes[:3]:
                world.freeze(node)
            begun_s = asyncio.get_running_loop().time()
            assert await prefetch(asker.outer.context, donors, tmp_path) == 2
            assert asyncio.get_running_loop().time() - begun_s < 6.0
            world.nodes.append(asker)

    run(main)


def test_what_a_donor_had_taken_when_it_fails_at_the_end_goes_to_one_that_was_through() -> None:
    faults = Faults()

    async def main() -> None:
        async with World(3, round_spec(outer={"snapshot_every": 2}), wrap=faults.wrap) as world:
            await world.rounds(2)
            first, second, asker = world.nodes
            context = asker.outer.context
            offer = await ask_manifest(context, second.name, 0)
            faults.arm(Chunk, "before", lambda peer: world.kill(first), who=first.name)
            snapshot = await download(context, offer, [first.name, second.name])  # of one batch
            assert faults.hit == first.name
            assert snapshot.state_root == second.outer.state_root

    run(main)


@pytest.mark.parametrize("nth", [1, 2])
def test_what_a_donor_owes_that_stands_still_at_the_end_others_give(nth: int) -> None:
    """What was: all waited for it, as long as one chunk may take, or eight of them where it drips."""
    faults = Faults()

    async def main() -> None:
        async with World(3, round_spec(outer={"snapshot_every": 2}), wrap=faults.wrap) as world:
            await world.rounds(2)
            first, second, asker = world.nodes
            context = asker.outer.context
            offer = await ask_manifest(context, second.name, 0)
            faults.arm_also(Arming("Chunk.sending", Action.FREEZE, nth=nth, who=first.name))
            async with asyncio.timeout(4.0):
                snapshot = await download(context, offer, [first.name, second.name])
            assert faults.hit == first.name
            assert snapshot.state_root == second.outer.state_root

    run(main)


@pytest.mark.parametrize("kind", [EntryItem, Chunk, PublishedPart, Manifest], ids=lambda kind: kind.__name__)
def test_a_donor_that_lies_is_refused_and_another_helps(kind: type) -> None:
    faults = Faults()

    async def main() -> None:
        async with World(3, round_spec(**big_spec()), size=BIG, wrap=faults.wrap) as world:
            await world.rounds(3, each=1)
            liar = world.nodes[0].name

            def tamper(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
                if peer == liar and isinstance(header, kind):
                    return header, bytes(payload)[:-1] + b"\x7f"
                return header, payload

            faults.tamper = tamper
            for number in range(5, 9):  # the order of donors is drawn: one of them meets the liar first
                await join(world, number)
                assert world.equal()
            assert any(node.outer.status()["refused"] for node in world.nodes[3:])

    run(main)


def test_nobody_to_learn_from_is_an_empty_stage() -> None:
    faults = Faults()

    async def main() -> None:
        async with World(1, wrap=faults.wrap) as world:
            await world.rounds(2)
            faults.tamper = lambda peer, header, payload: (
                header,
                b"" if isinstance(header, EntryItem) else payload,
            )
            with pytest.raises(StageEmpty, match="stage 0"):
                await join(world, 5)

    run(main)


def test_a_member_that_missed_rounds_replays_them_and_keeps_its_steps() -> None:
    async def main() -> None:
        async with World(3) as world:
            await world.rounds(2)
            away = world.nodes[2]
            world.freeze(away)
            away.step()
            await asyncio.sleep(3)
            await world.rounds(3, world.nodes[:2])
            assert away.outer.height == 2
            world.thaw(away)
            await world.reach(5)
            assert world.equal()
            world.assert_every_step_is_in_once()
            await world.rounds(1)
            world.assert_every_step_is_in_once()

    run(main)


def test_a_member_that_missed_its_own_listing_is_listed_by_the_entry() -> None:
    faults = Faults()

    async def main() -> None:
        async with World(3, wrap=faults.wrap) as world:
            await world.rounds(1)
            faults.arm(
                Commit,
                "receiving",
                lambda peer: world.freeze(next(n for n in world.nodes if n.name == peer)),
            )
            for node in world.nodes:
                node.step()
                node.step()
            await asyncio.sleep(4)
            others = [node for node in world.nodes if node.name != faults.hit]
            await world.rounds(6, others)  # past a snapshot
            missed = next(node for node in world.nodes if node.name == faults.hit)
            assert missed.outer.height == 1
            missed.step()
            world.thaw(missed)
            faults.wake()
            await world.reach(others[0].outer.height)
            assert world.equal()
            world.assert_every_step_is_in_once()

    run(main)


def test_a_lost_fork_gives_way_to_the_longer_chain() -> None:
    async def main() -> None:
        async with World(3) as world:
            await world.rounds(5)
            alone = world.nodes[0]
            others = world.nodes[1:]
            for node in others:
                world.network.cut(alone.name, node.name)
            world.sides = {alone.name: [alone], **{node.name: others for node in others}}
            await world.rounds(1, [alone])
            await world.rounds(3, others)
            assert not world.equal()
            world.sides = {}
            for node in others:
                world.network.heal(alone.name, node.name)
            await world.reach(8)
            assert world.equal()
            await world.rounds(2)
            assert world.equal()

    run(main)


def test_a_stage_that_was_emptied_comes_back_from_disk(tmp_path: Path) -> None:
    async def main() -> None:
        async with World(0) as world:
            for number in range(2):
                await join(world, number, 1, tmp_path / str(number))
            await world.rounds(7)
            head, root = world.nodes[0].outer.head, world.nodes[0].outer.state_root
            for node in list(world.nodes):
                await node.stop()
            world.nodes.clear()
            again = await join(world, 0, 2, tmp_path / "0")
            assert (again.outer.height, again.outer.head, again.outer.state_root) == (7, head, root)
            await join(world, 1, 2, tmp_path / "1")
            await world.rounds(2)
            assert world.equal()

    run(main)


def test_what_the_disk_has_is_not_written_again_by_who_comes_back(tmp_path: Path) -> None:
    """What was: every entry since the last snapshot, gigabytes where stages are large."""

    def written() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in tmp_path.rglob("*.safetensors")}

    async def main() -> None:
        async with World(0) as world:
            await join(world, 0, 1, tmp_path)
            await world.rounds(7)
            await world.nodes.pop().stop()
            before = written()
            assert len(before) > 3
            await (await join(world, 0, 2, tmp_path)).stop()
            assert written() == before
            world.nodes.clear()

    run(main)


def flip_a_bit_of_the_newest_snapshot(directory: Path) -> Path:
    newest = max(directory.rglob("snapshot-*.safetensors"))
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1
    newest.write_bytes(data)
    return newest


def test_damaged_files_are_refused_by_name_and_what_is_whole_is_used(tmp_path: Path) -> None:
    async def main() -> None:
        async with World(0) as world:
            await join(world, 0, 1, tmp_path)
            await world.rounds(9)
            await world.nodes[0].stop()
            newest = flip_a_bit_of_the_newest_snapshot(tmp_path)
            with pytest.raises(StorageError, match="state root"):
                load(newest, world.genesis.numel(), cut(world.genesis.numel(), 4096, 256))
            world.nodes.clear()
            again = await join(world, 0, 2, tmp_path)
            assert again.outer.height == 9, "the snapshot before it, and the journal"

    run(main)


def test_of_a_stage_fetched_ahead_again_and_again_the_disk_has_one_snapshot(tmp_path: Path) -> None:
    """A move may be cut short as often as there are rounds."""
    faults, chunks = Faults(), 0

    def count(peer: PeerId, header: object, payload: Buffer) -> tuple[object, Buffer]:
        nonlocal chunks
        chunks += isinstance(header, Chunk)
        return header, payload

    faults.tamper = count

    async def main() -> None:
        spec = round_spec(outer={"snapshot_every": 2})
        async with World(2, spec, wrap=faults.wrap) as world:
            donor, mover = world.nodes
            for height in (2, 4, 6):
                await world.rounds(2)
                assert await prefetch(mover.outer.context, [donor.name], tmp_path) == height
            before = chunks
            assert await prefetch(mover.outer.context, [donor.name], tmp_path) == height
            assert chunks == before, "what the disk has is not fetched again"

    run(main)
    (kept,) = tmp_path.rglob("snapshot-*")
    assert kept.name == "snapshot-000000000006.safetensors"


def test_a_snapshot_is_hashed_once_for_all_who_ask_for_it() -> None:
    """What was: anew for each, gigabytes at a time, and a joiner asks several donors."""
    hashed: list[object] = []

    async def counted(function: Callable[..., Any], *arguments: Any) -> Any:
        if function is chunk_hashes:
            hashed.append(arguments[0])
            await asyncio.sleep(3.0)
        return await inline(function, *arguments)

    async def main() -> None:
        async with World(3) as world:
            donor, *joiners = world.nodes
            await world.rounds(4)
            object.__setattr__(donor.outer.context, "offload", counted)
            asked = (ask_manifest(node.outer.context, donor.name, 0) for node in joiners)
            one, other = await asyncio.gather(*asked)
            assert one.hashes == other.hashes
            assert len(hashed) == 1
            await world.rounds(4)
            newer = await ask_manifest(joiners[0].outer.context, donor.name, 0)
            assert newer.hashes != one.hashes
            assert len(hashed) == 2

    run(main)


@pytest.mark.parametrize("error", [MessageTooLarge("beyond its bound"), MemoryError("beyond its bound")])
def test_a_write_that_fails_for_whatever_reason_keeps_nobody_from_leaving(
    tmp_path: Path, error: Exception
) -> None:
    """What was: memory that ran out ended the writing, and who left waited for it for ever."""

    def fails() -> None:
        raise error

    async def main() -> None:
        async with World(0) as world:
            node = await join(world, 1, directory=tmp_path)
            await asyncio.sleep(1.0)
            for _ in range(2):
                node.outer._snapshots.write(fails)
            async with asyncio.timeout(60.0):
                await node.stop()
            refused = [fields for kind, fields in node.events if kind == "disk-refused"]
            assert ["beyond its bound" in str(fields) for fields in refused] == [True, True]

    run(main)


def test_what_processes_that_were_killed_had_half_written_goes_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: only files of our own naming went, and safetensors writes under another: each kill amid a
    snapshot left one of its size for good."""

    class Killed(BaseException):
        pass

    def killed(tensors: object, path: Path, metadata: object = None) -> None:
        for unfinished in (Path(path), Path(path).with_name(".tmp0L6aYB")):
            unfinished.write_bytes(bytes(1000))
        raise Killed

    fragments = cut(8, 64, 8)
    state = snapshot_of(genesis_state(bytes(16), 0), torch.zeros(8), torch.zeros(8), fragments)

    def kept() -> list[str]:
        return [path.name for path in tmp_path.rglob("*") if path.is_file()]

    def store_at(height: int, *, dies: bool) -> None:
        with monkeypatch.context() as patch, suppress(Killed):
            if dies:
                patch.setattr("safetensors.torch.serialize_file", killed)
            store(tmp_path, replace(state, state=replace(state.state, height=height)), height)

    store_at(4, dies=True)
    assert len(kept()) == 2
    store_at(4, dies=False)
    assert kept() == ["snapshot-000000000004.safetensors"]
    store_at(8, dies=True)
    assert len(kept()) == 3
    newest_on_disk(tmp_path, 8, fragments)  # the next process begins
    assert kept() == ["snapshot-000000000004.safetensors"]
