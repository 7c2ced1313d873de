"""Writing a checkpoint: whole or not at all, one parameter at a time, the older ones untouched until it is.

Files go to a hidden folder, each flushed to disk; the manifest comes last, then the folder takes its name.
A process that is killed at any byte leaves a hidden folder, which the next writer removes, and a disk that is
full ends with StorageError. Blocking: callers on the event loop go through their `offload`, a file at a time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from blake3 import blake3

from shoal.protocol.errors import StorageError
from shoal.protocol.unbroken import Offload, unbroken
from shoal.training.checkpoint.manifest import (
    DIGEST,
    MANIFEST,
    SPEC,
    FileEntry,
    Manifest,
    StagePart,
    digest_of,
    file_of,
    numbered,
)
from shoal.training.spec import RunSpec

_PIECE_BYTES = 4 << 20  # hashed and written in turns, so that neither waits for all of the other
_HIDDEN = ".partial-"


class Writer:
    """One checkpoint on its way into `folder`, under the next number. Every method raises StorageError.

    Use as `with`: what is not finished by the end of it, for whatever reason, is gone.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        """`kind`: what follows the number in its name, `stage-0` or `whole`. Clears what a crash left."""
        with _told(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_partial(folder, kind)
            number = max((number for number, _ in numbered(folder)), default=0) + 1
            self.path = folder / f"{number:06d}-{kind}"
            self._partial = Path(tempfile.mkdtemp(f"-{kind}", _HIDDEN, folder))
        self._entries: list[FileEntry] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def add(self, parameter: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """A parameter's tensors, each on the CPU. In memory it is there twice for as long as this takes."""
        dense = {kind: tensor.contiguous() for kind, tensor in tensors.items()}
        self.add_file(file_of(parameter), [safetensors.torch.save(dense)])

    def add_file(self, name: str, pieces: Iterable[bytes | memoryview]) -> FileEntry:
        """A file from its bytes."""
        path, digest, size = self._partial / name, blake3(), 0
        with _told(path), path.open("xb") as file:
            for piece in pieces:
                view = memoryview(piece)
                for start in range(0, len(view), _PIECE_BYTES):
                    digest.update(view[start : start + _PIECE_BYTES])
                    file.write(view[start : start + _PIECE_BYTES])
                size += len(view)
            file.flush()
            os.fsync(file.fileno())
        entry = FileEntry(name=name, size=size, blake3=digest.hexdigest())
        self.note(entry)
        return entry

    def take_over(self, entry: FileEntry, source: Path) -> None:
        """A file of another checkpoint on this disk, which is never changed: shared where the disk can."""
        with contextlib.suppress(OSError):  # another disk, or one without links
            os.link(source, self.place(entry.name))
            self.note(entry)
            return
        with _told(source), source.open("rb") as file:
            if self.add_file(entry.name, iter(lambda: file.read(_PIECE_BYTES), b"")) != entry:
                raise StorageError(f"{source} is not as it was written\ncheck it: shoal checkpoint verify")

    def place(self, name: str) -> Path:
        """Where a download puts a file; `note` follows when it is there, verified and flushed."""
        return self._partial / name

    @property
    def unfinished(self) -> Path:
        """Where its files are until `finish`."""
        return self._partial

    def note(self, entry: FileEntry) -> None:
        """A file has come to its place."""
        self._entries.append(entry)

    def finish(self, spec: RunSpec, parts: Sequence[StagePart], spec_bytes: bytes | None = None) -> str:
        """Give it its name; returns its digest. `spec_bytes`: as another version of shoal wrote them."""
        canonical = spec_bytes if spec_bytes is not None else spec.canonical()
        self.add_file(SPEC, [canonical])
        manifest = Manifest(
            run_id=blake3(canonical).hexdigest(),
            run_name=spec.run.name,
            parts=tuple(parts),
            files=tuple(sorted(self._entries, key=lambda entry: entry.name)),
        )
        data = manifest.canonical()
        return self.seal(data)

    def seal(self, manifest: bytes) -> str:
        """Write a manifest and move the folder to its place; returns the digest."""
        digest = digest_of(manifest)
        self.add_file(MANIFEST, [manifest])
        self.add_file(DIGEST, [f"{digest}  {MANIFEST}\n".encode()])
        with _told(self.path):
            _flush_folder(self._partial)
            self._partial.rename(self.path)
            _flush_folder(self.path.parent)
        return digest

    def discard(self) -> None:
        """Nothing stays of what was not finished; what was is elsewhere by now."""
        shutil.rmtree(self._partial, ignore_errors=True)


@contextlib.asynccontextmanager
async def writing(offload: Offload, folder: Path, kind: str) -> AsyncIterator[Writer]:
    """A Writer for as long as the context lasts: `with` for the event loop, cancelled or not.

    Its caller offloads with `uncut` too, so that no thread writes into what is being removed.
    """
    made: list[Writer] = []
    try:
        await unbroken(offload(lambda: made.append(Writer(folder, kind))))
        yield made[0]
    finally:
        for writer in made:
            await unbroken(offload(writer.discard))


def prune(folder: Path, kind: str, kept: int) -> None:
    """Remove the oldest of a kind beyond `kept`. Raises StorageError."""
    old = [path for _, path in numbered(folder) if path.name.endswith(f"-{kind}")][:-kept]
    with _told(folder):
        for path in old:  # hidden first: half of it must never be taken for a checkpoint
            hidden = path.with_name(f"{_HIDDEN}{path.name}")
            path.rename(hidden)
            shutil.rmtree(hidden)


def make_room(folder: Path, kind: str) -> bool:
    """Remove the oldest of a kind where another one stays; whether there was one. Raises StorageError."""
    there = len([path for _, path in numbered(folder) if path.name.endswith(f"-{kind}")])
    if there > 1:
        prune(folder, kind, there - 1)
    return there > 1


def is_full(refusal: StorageError) -> bool:
    """Whether room is all that it wants."""
    cause = refusal.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _remove_partial(folder: Path, kind: str) -> None:
    """What a killed process left. One process writes a kind to a folder, one at a time."""
    for path in folder.glob(f"{_HIDDEN}*-{kind}"):
        shutil.rmtree(path, ignore_errors=True)


def _flush_folder(path: Path) -> None:
    """Names on disk, not only contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror or error}; the checkpoints before it are as they were\n"
            "free space there, see that it can be written, or name another --data-dir"
        ) from error
