"""Start: a run that begins from a checkpoint named in its spec, each peer with the files of its own stage.

Whoever imported it has it whole on disk (the owner's peer, as a rule); a peer that fetched its stage keeps
those files and gives them to the next. So the owner may vanish once every stage has a replica.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from shoal.protocol.errors import NotHere, ShoalError, StageEmpty, StorageError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.training.checkpoint.fetch import fetch_checkpoint
from shoal.training.checkpoint.manifest import SPEC, Manifest, file_of
from shoal.training.checkpoint.read import Checkpoint, open_checkpoint
from shoal.training.checkpoint.share import find
from shoal.training.model.layout import StageLayout
from shoal.training.outer.context import Event, Offload
from shoal.training.spec import RunSpec

_PATIENCE_S = 60.0  # for somebody who has it to be found, since the last file came, ...
_TRIES = 3  # ... and at least so many attempts, however long each one takes
_PAUSE_S = (0.5, 1.5)
_FOLDER = "000001-start"
T = TypeVar("T")
Read = Callable[[Checkpoint, RunSpec, StageLayout], T]


async def start_state(
    spec: RunSpec,
    layout: StageLayout,
    read: Read[T],
    *,
    folders: Sequence[Path],
    fetched: Path,
    transport: Transport,
    peers: Callable[[], Sequence[PeerId]],
    offload: Offload,
    event: Event,
    rng: random.Random,
) -> T:
    """What a stage begins with by `checkpoint.start`, as `read` takes it up: from `folders`, or from `peers`.

    `fetched` is the folder that takes what came from peers. Raises StageEmpty when nobody has it,
    StorageError for the disk, SpecError for a model of another shape.
    """
    digest = bytes.fromhex(spec.checkpoint.start)

    def needed(checkpoint: Checkpoint) -> set[str]:
        return _needed(checkpoint.manifest, layout)

    loop = asyncio.get_running_loop()
    until_s, tries, reason = loop.time() + _PATIENCE_S, 0, ""

    def arrived(_: int) -> None:  # it stays: the next attempt goes on from there
        nonlocal until_s, tries
        until_s, tries = loop.time() + _PATIENCE_S, 0

    while True:
        try:
            places = [*folders, fetched]
            found: T = await offload(_load, places, fetched, digest.hex(), spec, layout, read)
            return found
        except NotHere as error:
            reason = reason or str(error)
        if loop.time() >= until_s and tries >= _TRIES:
            raise StageEmpty(
                f"the run starts from checkpoint {digest.hex()[:8]}, and nobody hands it over: {reason}\n"
                "whoever imported it (the owner, as a rule) has to be online until each stage has a peer"
            )
        tries += 1
        donors = list(peers())
        rng.shuffle(donors)
        try:
            await fetch_checkpoint(transport, donors, digest, needed, fetched / _FOLDER, offload, arrived)
            event("start-fetched", {"checkpoint": digest.hex(), "parameters": layout.size})
        except StorageError:
            raise
        except ShoalError as error:
            reason = str(error)
            await asyncio.sleep(rng.uniform(*_PAUSE_S))


def _load(
    folders: Sequence[Path],
    fetched: Path,
    digest: str,
    spec: RunSpec,
    layout: StageLayout,
    read: Read[T],
) -> T:
    """From the disk. Raises NotHere where something has to be fetched."""
    path = find(folders, digest)
    try:
        checkpoint = open_checkpoint(path, partly=True)
        if absent := [name for name in _needed(checkpoint.manifest, layout) if not (path / name).exists()]:
            raise NotHere(f"{absent[0]} of checkpoint {digest[:8]} is not here")
        return read(checkpoint, spec, layout)
    except StorageError as error:
        if path.parent != fetched:
            raise
        shutil.rmtree(path, ignore_errors=True)  # a fetched copy, damaged since: fetch it again
        raise NotHere(str(error)) from error


def _needed(manifest: Manifest, layout: StageLayout) -> set[str]:
    names = {SPEC, *(file_of(slot.name) for slot in layout.slots)}
    log = manifest.parts[0].log_file
    if layout.first and log is not None:
        names.add(log)
    return names
