"""Share: checkpoints on a peer's disk for those who need them, and fetching one's files from several peers.

A digest names a manifest, the manifest names each file's hash: it does not matter who answers. Files go
straight to the disk, and a donor that dies or lies costs the file it was sending.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from blake3 import blake3

from shoal.protocol.errors import MessageInvalid, NotHere, ShoalError, StorageError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Channel, Message, Stream, Transport, call
from shoal.training.checkpoint.manifest import (
    DIGEST,
    MANIFEST,
    MANIFEST_BYTES,
    FileEntry,
    Manifest,
    digest_of,
    parse_manifest,
)
from shoal.training.checkpoint.messages import CHUNK_BYTES, CheckpointManifest, FileChunk, FileOf, ManifestOf
from shoal.training.outer.context import GROUP_ROLES, Offload
from shoal.training.recovery.download import receive_soon

MANIFEST_METHOD, FILE_METHOD = "checkpoint.manifest", "checkpoint.file"
MANIFEST_S = 30.0
DONORS = 4  # at once


class Shelf:
    """The checkpoints in some folders, by digest; serves them to trainers and the owner."""

    def __init__(self, folders: Sequence[Path], offload: Offload) -> None:
        self._folders = folders
        self._offload = offload

    def serve(self, transport: Transport) -> None:
        """Register; the transport owns the handlers' tasks."""
        transport.serve(MANIFEST_METHOD, self._manifest, GROUP_ROLES)
        transport.serve(FILE_METHOD, self._file, GROUP_ROLES)

    async def _manifest(self, stream: Stream) -> None:
        request = (await stream.receive(ManifestOf)).header
        data = await self._offload(self._read_manifest, request.digest)
        await stream.send(CheckpointManifest(request.digest), data)

    async def _file(self, stream: Stream) -> None:
        request = (await stream.receive(FileOf)).header
        file: IO[bytes] = await self._offload(self._open, request.digest, request.name)
        try:
            offset = 0
            while data := await self._offload(file.read, CHUNK_BYTES):
                await stream.send(FileChunk(offset), data)
                offset += len(data)
        finally:
            file.close()

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
            if not path.parent.name.startswith(".") and path.read_bytes()[:64] == digest.encode():
                return path.parent
    raise NotHere(f"checkpoint {digest[:8]} is not here")


async def fetch_manifest(transport: Transport, donor: PeerId, digest: bytes) -> tuple[Manifest, bytes]:
    """A manifest and its bytes, as the digest says. Raises NotHere, StorageError and what `call` raises."""
    reply = await call(
        transport,
        donor,
        MANIFEST_METHOD,
        ManifestOf(digest),
        CheckpointManifest,
        timeout_s=MANIFEST_S,
        max_payload_bytes=MANIFEST_BYTES,
        channel=Channel.BULK,
    )
    return checked_manifest(donor, reply, digest)


def checked_manifest(
    donor: PeerId, reply: Message[CheckpointManifest], digest: bytes
) -> tuple[Manifest, bytes]:
    """What came. Raises MessageInvalid and StorageError."""
    data = bytes(reply.payload)
    if digest_of(data) != digest.hex():
        raise MessageInvalid(f"a manifest of {donor} that does not fit its digest")
    return parse_manifest(data, f"the manifest from {donor}"), data


async def fetch_files(
    transport: Transport,
    donors: Sequence[PeerId],
    digest: bytes,
    files: Sequence[tuple[FileEntry, Path]],
    offload: Offload,
    arrived: Callable[[int], None] = lambda size_bytes: None,
) -> None:
    """Fetch files, each verified, to where they shall lie. Raises NotHere when every donor failed."""
    missing = list(files)
    reasons: list[str] = []

    async def work(donor: PeerId) -> None:
        lacks: set[str] = set()  # it may have some of them only, those of its stage
        while job := next((job for job in missing if job[0].name not in lacks), None):
            missing.remove(job)
            entry, path = job
            try:
                await _fetch(transport, donor, digest, entry, path, offload)
                arrived(entry.size)
            except StorageError:
                raise  # of this disk
            except ShoalError as error:
                missing.append(job)
                reasons.append(f"{donor}: {error}")
                lacks.add(entry.name)
                if not isinstance(error, NotHere):
                    return

    waiting = list(donors)
    while missing and waiting:
        now, waiting = waiting[:DONORS], waiting[DONORS:]
        try:
            async with asyncio.TaskGroup() as tasks:
                for donor in now:
                    tasks.create_task(work(donor))
        except* StorageError as group:
            raise group.exceptions[0] from None
    if missing:
        raise NotHere(
            f"{len(missing)} of {len(files)} files of checkpoint {digest.hex()[:8]} not found: "
            f"{'; '.join(reasons[:4]) or 'nobody to ask'}"
        )


async def _fetch(
    transport: Transport, donor: PeerId, digest: bytes, entry: FileEntry, path: Path, offload: Offload
) -> None:
    arriving: _Arriving = await offload(_Arriving, path)
    try:
        async with transport.open(donor, FILE_METHOD, Channel.BULK) as stream:
            await stream.send(FileOf(digest, entry.name))
            await stream.end()
            while arriving.size < entry.size:
                most = min(CHUNK_BYTES, entry.size - arriving.size)
                message = await _receive(stream, most)
                if message.header.offset != arriving.size or not message.payload:
                    raise MessageInvalid(f"{entry.name} of {donor}: a gap at {arriving.size}")
                await offload(arriving.add, message.payload)
        if arriving.digest != entry.blake3:
            raise MessageInvalid(f"{entry.name} of {donor} does not fit its hash")
        await offload(arriving.keep)
    finally:
        await offload(arriving.close)


async def _receive(stream: Stream, most: int) -> Message[FileChunk]:
    """The next chunk. Trouble with the donor's disk is the donor's: StorageError speaks of the own one."""
    try:
        return await receive_soon(stream, FileChunk, most)
    except StorageError as error:
        raise NotHere(f"its disk: {error}") from error


class _Arriving:
    """A file on its way to the disk. Blocking; raises StorageError."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._path = path
        self._hash = blake3()
        self._arriving = path.with_name(f".{path.name}")
        try:
            self._file = self._arriving.open("wb")
        except OSError as error:
            raise self._refused(error) from error

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def add(self, data: memoryview) -> None:
        self._hash.update(data)
        self.size += len(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise self._refused(error) from error

    def keep(self) -> None:
        """It is whole: give it its name."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._arriving.rename(self._path)
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # what was buffered did not fit
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> StorageError:
        return StorageError(f"{self._path}: {error.strerror or error}; free space there")


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MANIFEST_BYTES)
    except OSError as error:
        raise NotHere(f"the checkpoint {path.parent.name} cannot be read here") from error
