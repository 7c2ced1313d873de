"""A disk that is full: the peer says what and which command helps, trains on, and writes again in time."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from outer_world import Node, World, inline, round_spec
from safetensors.torch import save_file

from shoal.node.events import sentence
from shoal.node.owner.invitations import keep_addresses
from shoal.node.view.buffer import Buffer
from shoal.protocol.errors import StorageError
from shoal.protocol.virtual_time import run
from shoal.training.data.corpus import open_corpus
from shoal.training.data.tokenizer import load_tokenizer
from shoal.training.outer.log import genesis_state
from shoal.training.outer.parts import cut
from shoal.training.outer.snapshot import Snapshot, snapshot_of
from shoal.training.recovery import whole_file
from shoal.training.recovery.snapshots import newest_on_disk, snapshot_path, store
from shoal.training.spec import RunSpec


class Disk:
    """Of which a stage's folder gets so many bytes."""

    def __init__(self, folder: Path, most_bytes: float = float("inf")) -> None:
        self.folder = folder
        self.most_bytes = most_bytes
        self.refused = "nothing"  # whatever room there is

    def save(
        self, tensors: Mapping[str, torch.Tensor], path: Path, facts: Mapping[str, str] | None = None
    ) -> None:
        taken = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        wanted = taken + sum(tensor.nbytes for tensor in tensors.values())
        if wanted > self.most_bytes or self.refused in path.name:
            raise OSError(28, "No space left on device", str(path))
        save_file(dict(tensors), path, dict(facts) if facts else None)


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual time has none."""
    monkeypatch.setattr(asyncio, "to_thread", inline)


def heard(node: Node, kind: str) -> list[dict[str, Any]]:
    return [fields for told, fields in node.events if told == kind]


@asynccontextmanager
async def with_a_disk(folder: Path) -> AsyncIterator[tuple[World, Node]]:
    """Three nodes, of which the last keeps its log and snapshots in a folder."""
    async with World(2, round_spec(outer={"snapshot_every": 2})) as world:
        node = world.node(5, directory=folder)
        await node.start()
        world.nodes.append(node)
        yield world, node


def test_a_full_disk_is_told_once_with_what_helps_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: nothing to read, but for programs."""
    disk = Disk(tmp_path)
    monkeypatch.setattr(whole_file, "save_file", disk.save)

    async def main() -> None:
        async with with_a_disk(tmp_path) as (world, node):
            await world.rounds(2)
            disk.most_bytes = 0
            await world.rounds(3)
            refused = heard(node, "disk-refused")
            assert len(refused) >= 3
            told = [text for fields in refused if (text := sentence("disk-refused", fields)) is not None]
            (text,) = told
            assert "No space left on device" in text
            assert "--data-dir" in text
            assert not heard(node, "disk-back")
            disk.most_bytes = float("inf")
            await world.rounds(2)
            assert len(heard(node, "disk-back")) == 1
            disk.most_bytes = 0
            await world.rounds(1)
            texts = [fields for fields in heard(node, "disk-refused") if "text" in fields]
            assert len(texts) == 2, "what comes again is told again"
            assert world.equal()

    run(main)


def test_a_disk_that_takes_small_files_alone_is_not_said_to_be_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: an entry that fitted was told as good news, the next snapshot as bad, and so on for ever."""
    disk = Disk(tmp_path)
    monkeypatch.setattr(whole_file, "save_file", disk.save)

    async def main() -> None:
        async with with_a_disk(tmp_path) as (world, node):
            disk.refused = "snapshot"
            await world.rounds(8)
            assert len(heard(node, "disk-refused")) >= 3
            assert len([fields for fields in heard(node, "disk-refused") if "text" in fields]) == 1
            assert not heard(node, "disk-back")
            disk.refused = "nothing"
            await world.rounds(3)
            assert len(heard(node, "disk-back")) == 1

    run(main)


def test_on_a_full_disk_what_is_not_needed_any_more_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was: a new snapshot had to find room beside two old ones and the journal; where there was none,
    they stayed for good, and so did the refusal."""
    size = 4096
    fragments = cut(size, 1 << 20, 64)

    def at(height: int) -> Snapshot:
        state = genesis_state(bytes(16), 0)
        state = type(state)(state.stage, height, bytes([height]) * 32, state.tokens, (), (), ())
        return snapshot_of(state, torch.zeros(size), torch.ones(size), fragments)

    disk = Disk(tmp_path, 2.5 * 8 * size)
    monkeypatch.setattr(whole_file, "save_file", disk.save)
    for height in range(1, 5):
        store(tmp_path, at(height), max(1, height - 1))
    kept = sorted(path.name for path in tmp_path.glob("snapshot-*"))
    assert kept == [snapshot_path(tmp_path, height).name for height in (3, 4)]
    newest = newest_on_disk(tmp_path, size, fragments)
    assert newest is not None
    assert newest.height == 4


def test_the_owners_peer_outlives_a_disk_that_takes_no_addresses() -> None:
    """What was: it ended when somebody joined, for the addresses that new tokens carry had changed."""
    there = ["/ip4/127.0.0.1/tcp/1"]
    kept: list[tuple[str, ...]] = []
    told: list[tuple[str, Any]] = []
    full = False

    def keep(found: tuple[str, ...]) -> None:
        if full:
            raise StorageError("cannot write addresses: No space left on device; free space there")
        kept.append(found)

    directory = SimpleNamespace(
        bootstrap_addresses=lambda: tuple(there[:1]), met_addresses=lambda most: there[1:]
    )
    presence: Any = SimpleNamespace(directory=directory)
    owner: Any = SimpleNamespace(keep_addresses=keep, invitation=lambda now: (Path("join.token"), "shoal1-"))

    async def main() -> None:
        nonlocal full
        keeping = asyncio.create_task(
            keep_addresses(presence, owner, lambda kind, fields: told.append((kind, fields)))
        )
        await asyncio.sleep(60.0)
        full = True
        there.append("/ip4/127.0.0.1/tcp/2")
        await asyncio.sleep(600.0)
        assert not keeping.done()
        full = False
        await asyncio.sleep(60.0)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    run(main)
    assert kept == [tuple(there[:1]), tuple(there)]
    assert [kind for kind, _ in told] == ["invitation", "disk-refused"]
    assert "No space left on device" in str(sentence(*told[1]))


def test_places_on_a_volunteers_disk_are_told_nobody() -> None:
    root = Path("/srv/ann/shoal")
    why = f"{root}/peer-0/ab/stage-1/entry-1: full; free space there"
    fields = {"why": why, "nested": {"text": "/home/ann/.cache/shoal/corpora: full"}}
    places = [Path("/home/ann"), root, Path("/")]
    volunteer, owner = Buffer(places=places), Buffer(places=places, owner=True)
    for buffer in (volunteer, owner):
        buffer.add("disk-refused", fields)
    told, known = str(volunteer.after(0)), str(owner.after(0))
    assert "ann" not in told
    assert "stage-1/entry-1: full; free space there" in told
    assert "/srv/ann" in known


def test_a_corpus_that_finds_no_room_says_where_it_may_have_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, dir: Path, **__: object) -> str:
        raise OSError(28, "No space left on device", str(dir))

    (tmp_path / "a.txt").write_text("a line of text\n" * 500)
    spec = RunSpec.model_validate({"data": {"source": "text", "paths": [str(tmp_path / "a.txt")]}})
    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(StorageError, match=r"No space left on device.*\n.*SHOAL_CACHE_DIR"):
        open_corpus(spec, load_tokenizer(spec.data), tmp_path / "cache")
