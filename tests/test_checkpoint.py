"""Checkpoints (P7): whole or refused by name, and bit-equal in any other number of stages."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_world import KINDS, POSITIONS, STEPS, TOKENS, known, layouts, spec_of, state_of, write_stages
from slow_disk import SlowDisk

from shoal.protocol import virtual_time
from shoal.protocol.errors import SpecError, StorageError
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.training.checkpoint.keeper import Keeper
from shoal.training.checkpoint.manifest import DIGEST, MANIFEST, SPEC, FileEntry, digest_of, numbered
from shoal.training.checkpoint.read import Checkpoint, open_checkpoint, verify
from shoal.training.checkpoint.reshape import load_stage
from shoal.training.checkpoint.share import Shelf, held
from shoal.training.checkpoint.write import prune
from shoal.training.inner import Moments
from shoal.training.outer.snapshot import Snapshot

torch.set_num_threads(1)


@pytest.mark.parametrize("saved", [1, 2, 4])
@pytest.mark.parametrize("loaded", [1, 2, 4])
def test_loads_bit_equal_into_any_number_of_stages(tmp_path: Path, saved: int, loaded: int) -> None:
    checkpoint = write_stages(tmp_path, spec_of(saved))
    verify(checkpoint)
    target = spec_of(loaded)
    for layout in layouts(target):
        state = load_stage(checkpoint, target, layout)
        assert state.moments is not None
        found = (state.weights, state.momentum, state.moments.mean, state.moments.square)
        for kind, values in zip(KINDS, found, strict=True):
            assert values.numpy().tobytes() == known(layout, kind).numpy().tobytes()
        assert (state.moments.steps, state.log_tokens) == (STEPS, TOKENS)
        assert state.positions == (POSITIONS if layout.first else ())


def test_equal_states_give_equal_bytes_and_so_equal_digests(tmp_path: Path) -> None:
    first, second = (write_stages(tmp_path / name, spec_of(2)) for name in "ab")
    assert first.digest == second.digest


def test_a_model_of_another_shape_is_refused_with_both_values(tmp_path: Path) -> None:
    checkpoint = write_stages(tmp_path, spec_of(2))
    other = spec_of(2, feedforward=40, norm_epsilon=1e-6)
    with pytest.raises(
        SpecError, match=r"model\.feedforward = 40.*norm_epsilon = 1e-06, the checkpoint has 1e-05"
    ):
        load_stage(checkpoint, other, layouts(other)[0])


def test_a_part_of_one_stage_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    spec = spec_of(2)
    part = write_stages(tmp_path, spec, "stage-1", range(1, 2))
    assert not part.whole
    load_stage(part, spec, layouts(spec)[1])
    with pytest.raises(StorageError, match="has no embedding: it holds only some of the stages"):
        load_stage(part, spec, layouts(spec)[0])


PARAMETER = "layers.2.attention.k.safetensors"


def _flip(name: str, at: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(at * (len(data) - 1))] ^= 0x10
        (folder / name).write_bytes(data)

    return damage


def _cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


def _grow(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes() + b"\0")

    return damage


def _link(folder: Path) -> None:
    (folder / PARAMETER).rename(folder.parent / "elsewhere")
    (folder / PARAMETER).symlink_to(folder.parent / "elsewhere")


def _swap(folder: Path) -> None:
    one, other = folder / PARAMETER, folder / PARAMETER.replace(".k.", ".v.")
    one.rename(folder.parent / "kept")
    other.rename(one)
    (folder.parent / "kept").rename(other)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "first bit of a parameter": (_flip(PARAMETER, 0.0), PARAMETER),
    "bit in the middle": (_flip(PARAMETER, 0.5), PARAMETER),
    "last bit": (_flip(PARAMETER, 1.0), PARAMETER),
    "truncated": (_cut(PARAMETER), PARAMETER),
    "grown": (_grow(PARAMETER), PARAMETER),
    "missing": (lambda folder: (folder / PARAMETER).unlink(), PARAMETER),
    "extra": (lambda folder: (folder / "more.safetensors").touch(), "more.safetensors"),
    "two parameters swapped": (_swap, PARAMETER),
    "link to elsewhere": (_link, PARAMETER),
    "log": (_flip("log.1.bin", 0.5), "log.1.bin"),
    "log missing": (lambda folder: (folder / "log.0.bin").unlink(), "log.0.bin"),
    "spec": (_flip(SPEC, 0.5), SPEC),
    "spec missing": (lambda folder: (folder / SPEC).unlink(), SPEC),
    "manifest": (_flip(MANIFEST, 0.5), MANIFEST),
    "manifest missing": (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
    "digest": (_flip(DIGEST, 0.1), MANIFEST),
    "digest missing": (lambda folder: (folder / DIGEST).unlink(), MANIFEST),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_the_file(tmp_path: Path, kind: str) -> None:
    path = write_stages(tmp_path / "store", spec_of(2)).path
    damage, named = DAMAGES[kind]
    damage(path)
    with pytest.raises(StorageError) as refusal:
        verify(open_checkpoint(path))
    assert f"the checkpoint {path} is refused: {named}: " in str(refusal.value)


def test_every_flipped_byte_of_a_parameter_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    spec = spec_of(1)
    checkpoint = write_stages(tmp_path, spec)
    file = checkpoint.path / "layers.0.attention_norm.safetensors"
    whole = file.read_bytes()
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StorageError, match=r"layers\.0\.attention_norm\.safetensors"):
            load_stage(checkpoint, spec, layouts(spec)[0])


def _forge(checkpoint: Checkpoint, change: Callable[[dict[str, object]], None]) -> None:
    """A manifest that says something else, with a digest that fits it."""
    values = json.loads((checkpoint.path / MANIFEST).read_bytes())
    change(values)
    data = json.dumps(values).encode()
    (checkpoint.path / MANIFEST).write_bytes(data)
    (checkpoint.path / DIGEST).write_text(digest_of(data))


def _set(*keys: object, value: object) -> Callable[[dict[str, object]], None]:
    def change(values: object) -> None:
        for key in keys[:-1]:
            values = values[key]  # type: ignore[index]
        values[keys[-1]] = value  # type: ignore[index]

    return change


def _with_squares(value: float) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        tensors = safetensors.torch.load((checkpoint.path / PARAMETER).read_bytes())
        tensors["inner_square"][0] = value
        _replace(checkpoint, safetensors.torch.save(tensors))

    return change


def _with_type(dtype: str, bits: int) -> Callable[[Checkpoint], None]:
    """Tensors of a type that safetensors knows, and its reader for torch may not."""

    def change(checkpoint: Checkpoint) -> None:
        shapes = safetensors.torch.load((checkpoint.path / PARAMETER).read_bytes())
        each = next(iter(shapes.values())).numel() * bits // 8
        header = {
            kind: {"dtype": dtype, "shape": [*tensor.shape], "data_offsets": [at * each, (at + 1) * each]}
            for at, (kind, tensor) in enumerate(shapes.items())
        }
        told = json.dumps(header).encode()
        _replace(checkpoint, len(told).to_bytes(8, "little") + told + bytes(each * len(shapes)))

    return change


def _replace(checkpoint: Checkpoint, data: bytes) -> None:
    """A parameter's file, with a manifest that fits it."""
    (checkpoint.path / PARAMETER).write_bytes(data)

    def change(values: Any) -> None:
        for entry in values["files"]:
            if entry["name"] == PARAMETER:
                entry |= {"size": len(data), "blake3": digest_of(data)}

    _forge(checkpoint, change)


FORGED_FILES: dict[str, tuple[Callable[[Checkpoint], None], str]] = {
    "halves": (_with_type("F16", 16), "torch.float16"),
    "eighths": (_with_type("F8_E4M3", 8), "torch.float8_e4m3fn"),
    "exponents": (_with_type("F8_E8M0", 8), ""),
    "four bits": (_with_type("F4", 4), ""),
    "six bits": (_with_type("F6_E2M3", 6), ""),
    "no number": (_with_squares(math.nan), "inner_square has values that are not finite"),
    "a square below zero": (_with_squares(-1.0), "inner_square has values below zero"),
}


@pytest.mark.parametrize("kind", FORGED_FILES)
def test_a_file_that_fits_its_manifest_and_is_none_of_ours_is_refused_by_its_name(
    tmp_path: Path, kind: str
) -> None:
    """What was: of some types of numbers a KeyError, which a peer's part of a stage could raise, too."""
    checkpoint = write_stages(tmp_path, spec_of(2))
    change, told = FORGED_FILES[kind]
    change(checkpoint)
    forged = open_checkpoint(checkpoint.path)
    with pytest.raises(StorageError, match=f"refused: {PARAMETER}: .*{told}"):
        verify(forged)


@pytest.mark.parametrize("call", ["stat", "listdir"])
def test_a_folder_that_cannot_be_read_is_refused_by_name_and_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Another user's, or a disk that fails: what was is a raw error of the system's."""
    theirs, ours = write_stages(tmp_path / "theirs", spec_of(2)), write_stages(tmp_path / "ours", spec_of(2))
    found = getattr(os, call)

    def refusing(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path).startswith(str(tmp_path / "theirs")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return found(path, *arguments, **named)

    monkeypatch.setattr(os, call, refusing)
    with pytest.raises(StorageError, match="theirs/000001-whole cannot be read: Permission denied"):
        open_checkpoint(theirs.path)
    there = held([tmp_path / "theirs", tmp_path / "ours"], ours.manifest.run_id, 0)
    assert [checkpoint.path for checkpoint, _ in there] == [ours.path]


def test_a_file_larger_than_memory_is_refused_by_name(tmp_path: Path) -> None:
    """Its model may have the largest parameter there is, and no such bytes take room on the disk."""
    checkpoint = write_stages(tmp_path, spec_of(2))
    with (checkpoint.path / PARAMETER).open("wb") as file:
        file.truncate(1 << 42)
    entries = [
        FileEntry(name=entry.name, size=1 << 42, blake3=entry.blake3) if entry.name == PARAMETER else entry
        for entry in checkpoint.manifest.files
    ]
    manifest = checkpoint.manifest.model_copy(update={"files": tuple(entries)})
    with pytest.raises(StorageError, match=f"{PARAMETER}: it is larger than this machine's memory"):
        replace(checkpoint, manifest=manifest).read(PARAMETER)


FORGERIES: dict[str, Callable[[dict[str, object]], None]] = {
    "a name that leads elsewhere": _set("files", 0, "name", value="../../identity.key"),
    "an absolute name": _set("files", 0, "name", value="/etc/passwd"),
    "a file larger than its parameter": _set("files", 3, "size", value=2**50),
    "a size below zero": _set("files", 3, "size", value=-1),
    "a hash that is none": _set("files", 3, "blake3", value="x"),
    "layers beyond the model": _set("parts", 1, "layers", value=[2, 400]),
    "layers twice": _set("parts", 1, "layers", value=[0, 4]),
    "a stage twice": _set("parts", 1, "stage", value=0),
    "another format": _set("format", value="shoal-checkpoint-2"),
    "a key that nobody knows": _set("surprise", value=1),
    "another run's name": _set("run_name", value="\x1b]0;mine\x07"),
    "no parts": _set("parts", value=[]),
    "no files": _set("files", value=[]),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_forged_manifest_is_refused(tmp_path: Path, kind: str) -> None:
    checkpoint = write_stages(tmp_path, spec_of(2))
    _forge(checkpoint, FORGERIES[kind])
    with pytest.raises(StorageError, match=r"manifest\.json"):
        open_checkpoint(checkpoint.path)


def test_older_ones_of_a_kind_go_once_a_newer_one_is_whole(tmp_path: Path) -> None:
    spec = spec_of(2)
    for _ in range(3):
        write_stages(tmp_path, spec)
        write_stages(tmp_path, spec, "stage-0", range(1))
    prune(tmp_path, "whole", 2)
    assert [path.name for _, path in numbered(tmp_path)] == [
        "000002-stage-0",
        "000003-whole",
        "000004-stage-0",
        "000005-whole",
        "000006-stage-0",
    ]


WRITE = """
import resource, signal, sys
from pathlib import Path
from checkpoint_world import spec_of, write_stages
limit, deadly = int(sys.argv[2]), sys.argv[3] == "kill"
spec = spec_of(2)
if deadly:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
write_stages(Path(sys.argv[1]), spec)
"""


@pytest.mark.parametrize("limit", [0, 1, 700, 4096, 40_000])
def test_killed_at_any_byte_the_ones_before_stay_whole(tmp_path: Path, limit: int) -> None:
    """The kernel kills the writer when a file reaches `limit` bytes; the next one clears up after it."""
    before = write_stages(tmp_path, spec_of(2))
    command = [sys.executable, "-c", WRITE, str(tmp_path), str(limit), "kill"]
    ended = subprocess.run(command, cwd=Path(__file__).parent, preexec_fn=_no_core, check=False)
    assert ended.returncode == -signal.SIGXFSZ
    assert [path for _, path in numbered(tmp_path)] == [before.path]
    verify(open_checkpoint(before.path))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")], "it was in the middle of something"
    after = write_stages(tmp_path, spec_of(2))
    verify(after)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001-whole", "000002-whole"]


def _no_core() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def test_a_full_disk_is_told_and_changes_nothing(tmp_path: Path) -> None:
    before = write_stages(tmp_path, spec_of(2))
    command = [sys.executable, "-c", WRITE, str(tmp_path), "4096", "refuse"]
    ended = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert "StorageError" in ended.stderr
    assert "the checkpoints before it are as they were" in ended.stderr
    verify(open_checkpoint(before.path))
    assert [path for _, path in numbered(tmp_path)] == [before.path]


def test_a_copy_on_another_disk_is_as_good(tmp_path: Path) -> None:
    checkpoint = write_stages(tmp_path / "here", spec_of(2))
    shutil.copytree(checkpoint.path, tmp_path / "there")
    copied = open_checkpoint(tmp_path / "there")
    verify(copied)
    assert copied.digest == checkpoint.digest


@pytest.mark.parametrize("room", [1.5, 2.5])
def test_on_a_full_disk_the_oldest_checkpoint_makes_room_if_another_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: float
) -> None:
    """What was: a new one had to find room beside all that are kept; where there was none, they stayed for
    good, and so did the refusal."""
    flush, spec = os.fsync, spec_of(1)
    (layout,) = layouts(spec)
    (tmp_path / "one").mkdir()
    one = write_stages(tmp_path / "one", spec).manifest.size_bytes

    def full(descriptor: int) -> None:
        if sum(file.stat().st_size for file in (tmp_path / "disk").rglob("*")) > room * one:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    async def main() -> None:
        rounds: list[int] = []

        async def of_snapshot() -> Snapshot:
            snapshot, _ = state_of(spec, 0, layout, height=rounds[-1])
            head = bytes([rounds[-1]]) * 32
            return replace(snapshot, state=replace(snapshot.state, head=head))

        async def of_moments() -> Moments:
            return state_of(spec, 0, layout, height=rounds[-1])[1]

        keeper = Keeper(
            spec,
            0,
            layout,
            transport=MemoryNetwork(random.Random(1)).transport(PeerId("a"), frozenset({Role.TRAINER})),
            folder=tmp_path / "disk",
            snapshot=of_snapshot,
            moments=of_moments,
            offload=SlowDisk(itertools.repeat(0.0)).offload,
            event=lambda kind, data: None,
        )
        heights = []
        for height in range(1, 6):
            rounds.append(height)
            with contextlib.suppress(StorageError):
                heights.append((await keeper.take()).manifest.parts[0].height)
        kept = [open_checkpoint(path) for _, path in numbered(tmp_path / "disk")]
        for checkpoint in kept:
            verify(checkpoint)
        told = [checkpoint.manifest.parts[0].height for checkpoint in kept]
        if room > 2.0:
            assert heights == [1, 2, 3, 4, 5]
            assert told == [4, 5]
        else:
            assert heights == told == [1], "the last one there is never goes first"

    monkeypatch.setattr(os, "fsync", full)
    virtual_time.run(main)


@pytest.mark.parametrize("at_s", [0.5, 1.5, 2.5, 3.5])
def test_a_checkpoint_that_is_cancelled_leaves_nothing_on_the_disk(tmp_path: Path, at_s: float) -> None:
    async def main() -> None:
        disk, spec = SlowDisk(itertools.repeat(1.0)), spec_of(1)
        (layout,) = layouts(spec)
        snapshot, moments = state_of(spec, 0, layout, height=8)

        async def of_snapshot() -> Snapshot:
            return snapshot

        async def of_moments() -> Moments:
            return moments

        keeper = Keeper(
            spec,
            0,
            layout,
            transport=MemoryNetwork(random.Random(1)).transport(PeerId("a"), frozenset({Role.TRAINER})),
            folder=tmp_path,
            snapshot=of_snapshot,
            moments=of_moments,
            offload=disk.offload,
            event=lambda kind, data: None,
        )
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(at_s):
                await keeper.take()
        await disk.still()
        assert os.listdir(tmp_path) == []
        assert len((await keeper.take()).manifest.files) > len(layout.slots)

    virtual_time.run(main)


def test_a_download_that_is_broken_off_does_not_make_the_loop_wait_for_the_disk(tmp_path: Path) -> None:
    begun, goes_on, closed_by = threading.Event(), threading.Event(), list[int]()

    class Stalled:
        def read(self, most: int) -> bytes:
            begun.set()
            goes_on.wait(10.0)
            return b""

        def close(self) -> None:
            closed_by.append(threading.get_ident())

    class Asked:
        async def receive(self, kind: object) -> Any:
            return SimpleNamespace(header=SimpleNamespace(digest=b"", name="a file"))

    async def main() -> None:
        shelf: Any = Shelf([tmp_path], asyncio.to_thread)
        shelf._open = lambda digest, name: Stalled()
        sending = asyncio.create_task(shelf._file(Asked()))
        await asyncio.to_thread(begun.wait, 10.0)
        sending.cancel()
        await asyncio.sleep(0)
        goes_on.set()
        await asyncio.gather(sending, return_exceptions=True)
        assert closed_by
        assert closed_by != [threading.get_ident()]

    asyncio.run(main())
