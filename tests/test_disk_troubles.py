"""A disk that turns read-only, answers with errors, stands still or is slow: the peer trains on beside it."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from outer_world import Node, World, inline, round_spec

from shoal.node.events import sentence
from shoal.protocol.errors import StorageError
from shoal.protocol.private_files import create_private, read_private, write_private
from shoal.protocol.virtual_time import run
from shoal.training.recovery import whole_file


class ReadOnly:
    """What the kernel says of a folder on a disk that was remounted read-only, while `on`: also to who would
    remove a name that is not there."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.on = False
        self._folder = folder
        for name in ("unlink", "replace", "link", "rename"):
            patch.setattr(os, name, self._guarded(getattr(os, name), lambda *arguments: True))
        patch.setattr(os, "open", self._guarded(os.open, lambda path, flags, *_: flags & os.O_CREAT))
        patch.setattr(whole_file, "save_file", self._guarded(whole_file.save_file, lambda *_: True, 1))

    def _guarded(
        self, function: Callable[..., Any], writes: Callable[..., object], at: int = 0
    ) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            path = str(arguments[at])
            if self.on and path.startswith(str(self._folder)) and writes(*arguments):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
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
            assert "--data-dir" in text
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
