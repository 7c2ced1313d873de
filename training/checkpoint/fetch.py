"""Fetch: a checkpoint's files from several peers, straight to the disk, each verified.

A donor that dies or lies costs the file it was sending. Files that are there already stay, so a fetch that
broke off goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from blake3 import blake3

from shoal.protocol import limits
from shoal.protocol.errors import MessageInvalid, NotHere, ShoalError, StorageError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Channel, Message, Stream, Transport, call
from shoal.protocol.unbroken import unbroken
from shoal.training.checkpoint.manifest import (
    DIGEST,
    MANIFEST,
    MANIFEST_BYTES,
    SPEC,
    FileEntry,
    Manifest,
    digest_of,
    parse_manifest,
)
from shoal.training.checkpoint.messages import CHUNK_BYTES, CheckpointManifest, FileChunk, FileOf, ManifestOf
from shoal.training.checkpoint.read import Checkpoint, open_checkpoint
from shoal.training.checkpoint.share import FILE_METHOD, MANIFEST_METHOD
from shoal.training.outer.ask_around import first_good, reasons
from shoal.training.outer.context import Offload
from shoal.training.recovery.download import receive_soon

MANIFEST_S = 30.0
DONORS = 4  # at once


async def fetch_checkpoint(
    transport: Transport,
    donors: Sequence[PeerId],
    digest: bytes,
    needed: Callable[[Checkpoint], Collection[str]],
    path: Path,
    offload: Offload,
    arrived: Callable[[int], None] = lambda size_bytes: None,
) -> None:
    """The `needed` files of a checkpoint into `path`; `arrived` hears of each. Raises NotHere, StorageError
    for this disk."""
    manifest, data, donors = await _manifest_of_any(transport, donors, digest)
    spec = manifest.entry(SPEC)
    if spec is None or spec.size > limits.SPEC_BYTES:
        raise NotHere(f"checkpoint {digest.hex()[:8]} has no spec: it is none of ours")
    await offload(_begin, path, data)
    await fetch_files(transport, donors, digest, [(spec, path / SPEC)], offload)
    opened: Checkpoint = await offload(open_checkpoint, path, True)  # sizes are what the model needs
    names = needed(opened)
    absent = [(entry, path / entry.name) for entry in manifest.files if entry.name in names]
    jobs = [job for job in absent if not job[1].exists()]
    await fetch_files(transport, donors, digest, jobs, offload, arrived)


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
    lacks: dict[PeerId, set[str]] = {donor: set() for donor in donors}  # it may have its stage's files only
    failures: list[str] = []

    def next_of(donor: PeerId) -> tuple[FileEntry, Path] | None:
        return next((job for job in missing if donor in lacks and job[0].name not in lacks[donor]), None)

    async def work(donor: PeerId) -> None:
        while job := next_of(donor):
            missing.remove(job)
            entry, path = job
            try:
                await _fetch(transport, donor, digest, entry, path, offload)
                arrived(entry.size)
            except StorageError:
                raise  # of this disk
            except ShoalError as error:
                missing.append(job)
                failures.append(f"{donor}: {error}")
                lacks[donor].add(entry.name)
                if not isinstance(error, NotHere):
                    del lacks[donor]

    while now := [donor for donor in lacks if next_of(donor)][:DONORS]:
        try:
            async with asyncio.TaskGroup() as tasks:
                for donor in now:
                    tasks.create_task(work(donor))
        except ExceptionGroup as group:  # not `except*`: Python 3.11.2 wraps what is raised there
            raise group.exceptions[0] from None
    if missing:
        raise NotHere(
            f"{len(missing)} of {len(files)} files of checkpoint {digest.hex()[:8]} not found: "
            f"{'; '.join(failures[:4]) or 'nobody to ask'}"
        )


async def _fetch(
    transport: Transport, donor: PeerId, digest: bytes, entry: FileEntry, path: Path, offload: Offload
) -> None:
    opened: list[_Arriving] = []
    try:
        await unbroken(offload(lambda: opened.append(_Arriving(path))))
        (arriving,) = opened
        async with transport.open(donor, FILE_METHOD, Channel.BULK) as stream:
            await stream.send(FileOf(digest, entry.name))
            await stream.end()
            while arriving.size < entry.size:
                most = min(CHUNK_BYTES, entry.size - arriving.size)
                message = await _receive(stream, most)
                came = message.header.offset, len(message.payload)
                if came != (arriving.size, most):  # less than all there is, and it could drip for ever
                    raise MessageInvalid(f"{entry.name} of {donor}: {came[1]} bytes at {came[0]}")
                await offload(arriving.add, message.payload)
        if arriving.digest != entry.blake3:
            raise MessageInvalid(f"{entry.name} of {donor} does not fit its hash")
        await offload(arriving.keep)
    finally:
        for arriving in opened:
            await unbroken(offload(arriving.close))


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
        """Half of it is of no use to anybody, and takes room."""
        try:
            self._file.close()
        except OSError as error:  # what was buffered did not fit
            raise self._refused(error) from error
        finally:
            with contextlib.suppress(OSError):
                self._arriving.unlink(missing_ok=True)

    def _refused(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self._path}: {error.strerror or error}; free space there, or see that it can be written"
        )


async def _manifest_of_any(
    transport: Transport, donors: Sequence[PeerId], digest: bytes
) -> tuple[Manifest, bytes, list[PeerId]]:
    """And the donors from who gave it on: those before it gave none, and are the last to be asked again."""

    async def ask(donor: PeerId) -> tuple[Manifest, bytes, PeerId]:
        return *await fetch_manifest(transport, donor, digest), donor

    found, failures = await first_good(donors, ask)
    if found is None:
        raise NotHere(reasons(failures))
    manifest, data, giver = found
    at = list(donors).index(giver)
    return manifest, data, [*donors[at:], *donors[:at]]


def _begin(path: Path, manifest: bytes) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        (path / MANIFEST).write_bytes(manifest)
        (path / DIGEST).write_text(f"{digest_of(manifest)}  {MANIFEST}\n")
    except OSError as error:
        raise StorageError(
            f"{path}: {error.strerror or error}; free space there, or see that it can be written"
        ) from error
