"""Share: the checkpoints on a peer's disk for those who need them.

A digest names a manifest, the manifest names each file's hash: it does not matter who answers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from shoal.protocol.errors import NotHere, ShoalError, StorageError
from shoal.protocol.transport import Channel, Stream, Transport
from shoal.protocol.unbroken import unbroken
from shoal.training.checkpoint.manifest import DIGEST, MANIFEST, MANIFEST_BYTES, numbered, parse_manifest
from shoal.training.checkpoint.messages import (
    CHUNK_BYTES,
    CheckpointManifest,
    FileChunk,
    FileOf,
    ManifestOf,
    Newest,
    NewestOf,
)
from shoal.training.checkpoint.read import Checkpoint, open_checkpoint
from shoal.training.outer.context import GROUP_ROLES, Offload

MANIFEST_METHOD, FILE_METHOD, NEWEST_METHOD = "checkpoint.manifest", "checkpoint.file", "checkpoint.newest"


class Shelf:
    """The checkpoints in some folders, by digest; serves them to trainers and the owner."""

    def __init__(self, folders: Sequence[Path], offload: Offload) -> None:
        self._folders = folders
        self._offload = offload

    def serve(self, transport: Transport) -> None:
        """Register; the transport owns the handlers' tasks."""
        transport.serve(MANIFEST_METHOD, self._manifest, GROUP_ROLES, Channel.BULK)
        transport.serve(FILE_METHOD, self._file, GROUP_ROLES, Channel.BULK)
        transport.serve(NEWEST_METHOD, self._newest, GROUP_ROLES)

    async def _manifest(self, stream: Stream) -> None:
        request = (await stream.receive(ManifestOf)).header
        data = await self._offload(self._read_manifest, request.digest)
        await stream.send(CheckpointManifest(request.digest), data)

    async def _newest(self, stream: Stream) -> None:
        request = (await stream.receive(NewestOf)).header
        run_id, below = request.run_id.hex(), request.below or math.inf
        found = await self._offload(newest, self._folders, run_id, request.stage, below)
        if found is None:
            raise NotHere(f"no checkpoint of stage {request.stage} is here")
        checkpoint, height = found
        await stream.send(Newest(bytes.fromhex(checkpoint.digest), height))

    async def _file(self, stream: Stream) -> None:
        request = (await stream.receive(FileOf)).header
        file: IO[bytes] = await self._offload(self._open, request.digest, request.name)
        try:
            offset = 0
            while data := await self._offload(file.read, CHUNK_BYTES):
                await stream.send(FileChunk(offset), data)
                offset += len(data)
        finally:
            await unbroken(self._offload(file.close))  # a read that was given up may still hold the file

    def _read_manifest(self, digest: bytes) -> bytes:
        return _read(find(self._folders, digest.hex()) / MANIFEST)

    def _open(self, digest: bytes, name: str) -> IO[bytes]:
        path = find(self._folders, digest.hex())
        if (
            parse_manifest(_read(path / MANIFEST), str(path)).entry(name) is None
        ):  # so no name leads elsewhere
            raise NotHere(f"checkpoint {digest.hex()[:8]} has no such file")
        try:
            return (path / name).open("rb")
        except OSError as error:
            raise NotHere(f"{name} of checkpoint {digest.hex()[:8]} is not here") from error


def find(folders: Sequence[Path], digest: str) -> Path:
    """The checkpoint of a digest, the oldest if there are several. Raises NotHere."""
    for folder in folders:
        for path in sorted(folder.glob(f"*/{DIGEST}")):
            with contextlib.suppress(OSError):  # it is being removed, or nobody's to read
                if not path.parent.name.startswith(".") and path.read_bytes()[:64] == digest.encode():
                    return path.parent
    raise NotHere(f"checkpoint {digest[:8]} is not here")


def newest(
    folders: Sequence[Path], run_id: str, stage: int, below: float = math.inf
) -> tuple[Checkpoint, int] | None:
    """The checkpoint in which a stage of a run is highest, and how high."""
    return next((found for found in held(folders, run_id, stage) if found[1] < below), None)


def held(folders: Sequence[Path], run_id: str, stage: int) -> list[tuple[Checkpoint, int]]:
    """The checkpoints that have a stage of a run, and how high, the highest first; those whose manifest or
    sizes are wrong do not count."""
    found: list[tuple[Checkpoint, int]] = []
    paths: list[Path] = []
    for folder in folders:
        with contextlib.suppress(StorageError):  # one that cannot be read hides no other
            paths += [path for _, path in numbered(folder)]
    for path in paths:
        try:
            opened = open_checkpoint(path)
        except ShoalError:
            continue  # `shoal checkpoint list` tells of it
        heights = [part.height for part in opened.manifest.parts if part.stage == stage and part.head]
        if opened.manifest.run_id == run_id and heights:
            found.append((opened, heights[0]))
    return sorted(found, key=lambda one: -one[1])


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MANIFEST_BYTES)
    except OSError as error:
        raise NotHere(f"the checkpoint {path.parent.name} cannot be read here") from error
