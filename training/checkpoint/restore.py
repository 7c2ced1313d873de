"""Restore: a stage that nobody holds any more goes on from the last checkpoint that has it.

What came after that checkpoint is lost, and the event says so. Called for a replica that found neither state
of its own nor a group; in a run that has just begun there is no checkpoint, and nothing happens.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.protocol.errors import MessageInvalid, ShoalError, StorageError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport, call
from shoal.training.checkpoint.fetch import fetch_checkpoint
from shoal.training.checkpoint.manifest import SPEC, file_of
from shoal.training.checkpoint.messages import Newest, NewestOf
from shoal.training.checkpoint.read import Checkpoint, open_checkpoint
from shoal.training.checkpoint.reshape import load_stage
from shoal.training.checkpoint.share import NEWEST_METHOD, held
from shoal.training.inner import Moments
from shoal.training.model.layout import StageLayout
from shoal.training.outer.context import Event, Offload
from shoal.training.outer.parts import cut
from shoal.training.outer.snapshot import Snapshot, snapshot_of
from shoal.training.spec import RunSpec

_ASK_S = 3.0
_FOLDER = "000001-restored"
_LOOKS = 8  # for something older, where what others offered could not be used
_AGAIN_S, _AGAIN_MOST_S = 2.0, 300.0  # until what was refused is read again, doubled each time
_REFUSED_MOST = 256


@dataclass(frozen=True, slots=True, eq=False)
class Restored:
    """A stage as a checkpoint has it."""

    snapshot: Snapshot
    moments: Moments | None
    digest: str


class Refused:
    """What could not be used, for who looks again and again: to read it takes the disk, or somebody's uplink.

    It may be mended, so it is not given up.
    """

    def __init__(self) -> None:
        self._until_s: dict[object, tuple[float, float]] = {}  # ... and how long the next time

    def waits(self, source: object) -> bool:
        """Whether it is too early to try this again."""
        return asyncio.get_running_loop().time() < self._until_s.get(source, (0.0, 0.0))[0]

    def note(self, source: object) -> None:
        """It was tried in vain."""
        wait_s = self._until_s.get(source, (0.0, _AGAIN_S))[1]
        if len(self._until_s) >= _REFUSED_MOST:
            self._until_s.clear()
        until_s = asyncio.get_running_loop().time() + wait_s
        self._until_s[source] = until_s, min(2.0 * wait_s, _AGAIN_MOST_S)


async def restore_stage(
    spec: RunSpec,
    stage: int,
    layout: StageLayout,
    *,
    folders: Sequence[Path],
    fetched: Path,
    transport: Transport,
    peers: Sequence[PeerId],
    offload: Offload,
    event: Event,
    refused: Refused,
) -> Restored | None:
    """The highest that `folders` or `peers` have whole; None if there is none. `fetched`: takes what peers
    give. What turns out to be damaged, or is not handed over, is told and noted in `refused`, and the next
    one tried."""
    run_id = spec.run_id()
    own = await offload(held, folders, run_id.hex(), stage)
    offers = await _offers(transport, peers, NewestOf(run_id, stage))
    looks = 0

    def needed(checkpoint: Checkpoint) -> set[str]:
        if checkpoint.manifest.run_id != run_id.hex():  # its own spec allows files of any size
            raise MessageInvalid(
                f"checkpoint {checkpoint.digest[:8]} is of another run, and offered for this"
            )
        logs = {p.log_file for p in checkpoint.manifest.parts if p.stage == stage and p.log_file}
        return {SPEC, *logs, *(file_of(slot.name) for slot in layout.slots)}

    async def fetch(digest: bytes) -> Checkpoint:
        path = fetched / _FOLDER
        await offload(shutil.rmtree, path, True)
        donors = [peer for peer, (offered, _) in offers.items() if offered == digest]
        await fetch_checkpoint(transport, donors, digest, needed, path, offload)
        opened: Checkpoint = await offload(open_checkpoint, path, True)
        return opened

    found: list[tuple[int, Checkpoint | bytes]] = [(height, checkpoint) for checkpoint, height in own]
    found += sorted({(height, digest) for digest, height in offers.values()})
    while found:
        height, source = best = max(found, key=lambda one: one[0])  # of equal ones the own, which come first
        found.remove(best)
        who = [peer for peer, (offered, _) in offers.items() if offered == source]
        name = (source, *sorted(who)) if isinstance(source, bytes) else source.path
        if not refused.waits(name):
            try:
                checkpoint = await fetch(source) if isinstance(source, bytes) else source
                restored: Restored = await offload(_load, checkpoint, spec, stage, layout)
                return restored
            except ShoalError as error:
                refused.note(name)
                event("checkpoint-refused", {"why": str(error)})
        if isinstance(source, bytes) and height and (looks := looks + 1) <= _LOOKS:
            older = await _offers(transport, who, NewestOf(run_id, stage, below=height))
            older = {peer: offer for peer, offer in older.items() if offer[1] < height}
            offers |= older
            found += sorted({(height, digest) for digest, height in older.values()})
    return None


async def _offers(
    transport: Transport, peers: Sequence[PeerId], question: NewestOf
) -> dict[PeerId, tuple[bytes, int]]:
    """Digest and height by peer, of those that have one."""
    found: dict[PeerId, tuple[bytes, int]] = {}

    async def ask(peer: PeerId) -> None:
        try:
            reply = await call(transport, peer, NEWEST_METHOD, question, Newest, timeout_s=_ASK_S)
        except ShoalError:
            return  # it has none, or is gone
        found[peer] = reply.header.digest, reply.header.height

    async with asyncio.TaskGroup() as tasks:
        for peer in peers:
            tasks.create_task(ask(peer))
    return found


def _load(checkpoint: Checkpoint, spec: RunSpec, stage: int, layout: StageLayout) -> Restored:
    """Raises StorageError for what is damaged or does not add up."""
    part = next((part for part in checkpoint.manifest.parts if part.stage == stage), None)
    log = checkpoint.log_state(part) if part is not None else None
    if part is None or log is None or checkpoint.manifest.run_id != spec.run_id().hex():
        raise StorageError(f"{checkpoint.path} is not of stage {stage} of this run")
    state = load_stage(checkpoint, spec, layout)
    fragments = cut(layout.size, spec.outer.part_bytes, spec.compression.block, spec.outer.fragments)
    snapshot = snapshot_of(log, state.weights, state.momentum, fragments)
    if snapshot.state_root.hex() != part.state_root:
        raise StorageError(f"{checkpoint.path}: the state root of stage {stage} does not match the content")
    return Restored(snapshot, state.moments, checkpoint.digest)
