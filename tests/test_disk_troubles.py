"""A disk that turns read-only, answers with errors, stands still or is slow: the peer trains on beside it."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from outer_world import Node, World, inline, round_spec
from safetensors.torch import save_file
from slow_disk import SlowDisk

from shoal.node.bench import Bench
from shoal.node.events import sentence
from shoal.protocol.errors import StorageError
from shoal.protocol.private_files import create_private, read_private, write_private
from shoal.protocol.virtual_time import run
from shoal.training.outer.log import genesis_state
from shoal.training.outer.parts import cut
from shoal.training.outer.snapshot import snapshot_of
from shoal.training.recovery import journal, whole_file
from shoal.training.recovery.journal import read_entries
from shoal.training.recovery.snapshots import (
    CLOSE_S,
    KEPT,
    VALUE_BYTES,
    bytes_in,
    has_snapshot,
    newest_on_disk,
    snapshot_path,
    store,
)


class ReadOnly:
    """What the kernel says of a folder on a disk that was remounted read-only, while `on`: also to who would
    remove a name that is not there."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.on = False
        self._folder = folder
        for name in ("unlink", "replace", "link", "rename"):
            patch.setattr(os, name, self._guarded(getattr(os, name), lambda *arguments: True))
        patch.setattr(os, "open", self._guarded(os.open, lambda path, flags, *_: flags & os.O_CREAT))
        patch.setattr(whole_file, "save_file", self._guarded(save_file, lambda *_: True, 1))

    def _guarded(
        self, function: Callable[..., Any], writes: Callable[..., object], at: int = 0
    ) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            path = str(arguments[at])
            if self.on and path.startswith(str(self._folder)) and writes(*arguments):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
            return function(*arguments, **named)

        return call


def broken(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """From now on the disk answers with errors whatever is asked of that folder."""
    for name in ("stat", "scandir", "listdir", "unlink", "open", "replace", "mkdir"):
        patch.setattr(os, name, _failing(getattr(os, name), folder))
    patch.setattr("shoal.training.recovery.whole_file.save_file", _failing(save_file, folder, 1))


def _failing(function: Callable[..., Any], folder: Path, at: int = 0) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        if arguments and str(arguments[at]).startswith(str(folder)):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(arguments[at]))
        return function(*arguments, **named)

    return call


def heard(node: Node, kind: str) -> list[dict[str, Any]]:
    return [fields for told, fields in node.events if told == kind]


@asynccontextmanager
async def with_a_disk(folder: Path, **outer: object) -> AsyncIterator[tuple[World, Node]]:
    """Three nodes, of which the last keeps its log and snapshots in a folder."""
    async with World(2, round_spec(outer={"snapshot_every": 2, **outer})) as world:
        node = world.node(5, directory=folder)
        await node.start()
        world.nodes.append(node)
        yield world, node


@pytest.mark.parametrize("write", [write_private, create_private])
def test_a_private_file_that_a_read_only_disk_refuses_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], object]
) -> None:
    """What was: the attempt to clear up after it ended in an error of the system's, which nobody expects."""
    disk = ReadOnly(tmp_path, monkeypatch)
    write(tmp_path / "there", b"1")
    disk.on = True
    for name in ("there", "new"):
        with pytest.raises(StorageError, match=f"{name}: Read-only file system"):
            write(tmp_path / name, b"2")
    disk.on = False
    assert read_private(tmp_path / "there", 9) == b"1"
    assert os.listdir(tmp_path) == ["there"]


def test_on_a_disk_that_turns_read_only_a_member_trains_on_and_tells_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: it took part in no round any more, for its promises were refused with a raw error."""
    monkeypatch.setattr(asyncio, "to_thread", inline)
    disk = ReadOnly(tmp_path, monkeypatch)

    async def main() -> None:
        async with with_a_disk(tmp_path) as (world, node):
            await world.rounds(2)
            disk.on = True
            listed = node.outer.status()["listed"]
            await world.rounds(4)
            assert node.outer.status()["listed"] == int(str(listed)) + 4
            refused = heard(node, "disk-refused")
            (text,) = [text for told in refused if (text := sentence("disk-refused", told)) is not None]
            assert "Read-only file system" in text
            assert "check the disk and its permissions" in text
            disk.on = False
            await world.rounds(3)
            assert len(heard(node, "disk-back")) == 1
            assert world.equal()
            height, root = node.outer.height, node.outer.state_root
            await node.stop()
            again = world.node(5, 2, tmp_path)
            await again.start()
            world.nodes[-1] = again
            assert (again.outer.height, again.outer.state_root) == (height, root)

    run(main)


def test_a_peer_whose_disk_cannot_be_read_joins_as_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: a raw error of the system's ended its process, again and again."""
    monkeypatch.setattr(asyncio, "to_thread", inline)

    async def main() -> None:
        async with with_a_disk(tmp_path) as (world, node):
            await world.rounds(5)
            await node.stop()
            broken(tmp_path, monkeypatch)
            again = world.node(5, 2, tmp_path)
            await again.start()
            world.nodes[-1] = again
            await world.rounds(2)
            assert world.equal()
            assert any("Input/output error" in str(told) for told in heard(again, "disk-refused"))

    run(main)


def test_a_chain_that_was_left_while_the_disk_refused_goes_once_it_takes_a_snapshot_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: a snapshot of it that is higher stayed the newest on the disk, and whoever came back alone
    would have gone on from there."""
    disk = ReadOnly(tmp_path, monkeypatch)

    async def main() -> None:
        async with with_a_disk(tmp_path) as (world, node):
            await world.rounds(2)
            snapshots = node.outer._snapshots
            assert snapshots.directory is not None
            lost = snapshot_path(snapshots.directory, 99)
            kept = snapshots.get(2)
            store(snapshots.directory, replace(kept, state=replace(kept.state, height=99)), 0)
            disk.on = True
            snapshots.switch(kept)
            await world.rounds(1)
            assert lost.exists()
            disk.on = False
            await world.rounds(3)
            assert not lost.exists()
            await node.stop()
            context = node.outer.context
            newest = newest_on_disk(snapshots.directory, context.size, context.fragments)
            assert newest is not None
            assert newest.height == node.outer.height == 6
            assert len(heard(node, "disk-back")) == 1

    run(main)


def test_a_folder_that_takes_state_and_no_promises_is_told_once_with_what_helps(tmp_path: Path) -> None:
    """What was: told to programs alone, round after round."""

    async def main() -> None:
        async with with_a_disk(tmp_path) as (world, node):
            await world.rounds(2)
            folder = node.outer._snapshots.directory
            assert folder is not None
            folder.chmod(0o777)
            await world.rounds(6)
            refused = heard(node, "disk-refused")
            assert len(refused) >= 6
            (text,) = [text for told in refused if (text := sentence("disk-refused", told)) is not None]
            assert f"chmod go-w {folder}" in text
            assert not heard(node, "disk-back")
            folder.chmod(0o700)
            await world.rounds(2)
            assert len(heard(node, "disk-back")) == 1

    run(main)


@pytest.mark.parametrize("oldest", [1, 3])
def test_a_copy_that_a_broken_disk_refuses_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, oldest: int
) -> None:
    """Whoever fetches a stage's state ahead expects that, and stays where it is."""
    fragments = cut(8, 64, 8)
    state = genesis_state(bytes(16), 0)
    held = snapshot_of(replace(state, height=3), torch.zeros(8), torch.zeros(8), fragments)
    store(tmp_path, held, 3)
    broken(tmp_path, monkeypatch)
    with pytest.raises(StorageError, match=r"Input/output error.*--data-dir"):
        store(tmp_path, held, oldest)
    assert not has_snapshot(tmp_path)
    assert newest_on_disk(tmp_path, 8, fragments) is None


def test_what_the_journal_holds_is_read_one_entry_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: all of it at once, and of a large stage that is more than a machine's memory."""
    steps: list[str] = []

    def read(directory: Path, from_height: int) -> Iterator[Any]:
        for entry in read_entries(directory, from_height):
            steps.append("read")
            yield entry

    async def main() -> None:
        async with with_a_disk(tmp_path, snapshot_every=8) as (world, _):
            await world.rounds(5)
            for other in list(world.live.values()):
                await other.stop()
            again = world.node(5, 2, tmp_path)
            again.outer._replica.applied.append(lambda *_: steps.append("applied"))
            await again.start()
            await again.stop()
            assert again.outer.height == 5

    monkeypatch.setattr(journal, "read_entries", read)
    run(main)
    assert steps == ["read", "applied"] * 5


@pytest.mark.parametrize("cancelled", [False, True])
def test_who_leaves_waits_for_a_slow_disk_no_longer_than_it_says(tmp_path: Path, cancelled: bool) -> None:
    """What was: until all that was queued had been written, hours on a disk that stands almost still."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with with_a_disk(tmp_path) as (world, node):
            await world.rounds(1)
            disk, snapshots = SlowDisk(itertools.repeat(1000.0)), node.outer._snapshots
            for _ in range(9):
                snapshots.write(lambda: None)
            object.__setattr__(node.outer.context, "disk", disk.offload)
            begun_s, writer = loop.time(), snapshots._writer
            if cancelled:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await snapshots.close()
                await asyncio.sleep(0)
            else:
                await node.stop()
                (told,) = heard(node, "disk-behind")
                assert "the last 9 writes of stage 0" in str(told["text"])
            assert loop.time() - begun_s <= CLOSE_S + 1.0
            assert writer is not None
            assert writer.done()
            await disk.still()

    run(main)


def test_what_waits_for_a_slow_disk_is_bounded_in_bytes_and_told_once(tmp_path: Path) -> None:
    """What was: 64 writes, of a large stage some snapshots and dozens of entries: more than its memory."""

    async def main() -> None:
        async with with_a_disk(tmp_path, payload_budget_bytes=1) as (world, node):
            await world.rounds(1)
            goes_on, snapshots, context = asyncio.Event(), node.outer._snapshots, node.outer.context

            async def stands_still(function: Callable[..., Any], *arguments: Any) -> Any:
                await goes_on.wait()
                return function(*arguments)

            object.__setattr__(context, "disk", stands_still)
            for _ in range(12):
                await world.rounds(1)
                assert snapshots._held_bytes <= 2 * KEPT * VALUE_BYTES * context.size
            queue = snapshots._writes
            writes = [queue.get_nowait() for _ in range(queue.qsize())]
            for write in writes:
                queue.put_nowait(write)
                queue.task_done()
            assert sum(bytes_in(arguments) for _, arguments, _ in writes) <= 2 * VALUE_BYTES * context.size
            told = [text for fields in heard(node, "disk-behind") if (text := fields.get("text")) is not None]
            assert ["slower than the rounds" in str(text) for text in told] == [True]
            goes_on.set()
            await snapshots._writes.join()
            assert not snapshots._held_bytes
            await world.rounds(2)
            height, root = node.outer.height, node.outer.state_root
            for other in list(world.live.values()):
                await other.stop()
            again = world.node(5, 2, tmp_path)
            await again.start()
            assert (again.outer.height, again.outer.state_root) == (height, root)
            await again.stop()

    run(main)


def test_a_disk_that_stands_still_leaves_its_threads_to_the_codecs(tmp_path: Path) -> None:
    """What was: writes and codecs shared two threads, and two snapshots on a slow disk held up the rounds."""
    goes_on = threading.Event()

    async def scene() -> None:
        async with Bench(0.0, 0.0) as bench:
            writes = [asyncio.ensure_future(bench.disk(goes_on.wait, 60.0)) for _ in range(8)]
            assert await bench.offload(sum, [1, 2]) == 3
            goes_on.set()
            assert all(await asyncio.gather(*writes))

    async def main() -> None:
        async with with_a_disk(tmp_path) as (world, node):
            done: dict[str, set[str]] = {"offload": set(), "disk": set()}

            def noting(name: str) -> Callable[..., Any]:
                def call(function: Callable[..., Any], *arguments: Any) -> Any:
                    done[name].add(getattr(function, "__name__", ""))
                    return inline(function, *arguments)

                return call

            for name in done:
                object.__setattr__(node.outer.context, name, noting(name))
            await world.rounds(4)
            assert done["disk"] == {"write_entry", "store"}
            assert not done["offload"] & done["disk"]

    asyncio.run(scene())
    run(main)
