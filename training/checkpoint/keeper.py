"""Keeper: writes checkpoints of one replica's stage beside its training, and serves the newest.

Anchor and outer momentum are never changed in place, so holding on to them is a copy; the inner optimizer's
moments are copied while micro-batches go on. Then file after file is written by `offload`, and training goes
on whatever the disk says. One at a time: whoever asks while one is written gets that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from shoal.protocol import wire
from shoal.protocol.errors import ShoalError, StorageError
from shoal.protocol.faults import define
from shoal.protocol.faulty_transport import point
from shoal.protocol.transport import Transport
from shoal.protocol.unbroken import uncut
from shoal.training.checkpoint.manifest import (
    MEAN,
    MOMENTUM,
    SQUARE,
    WEIGHTS,
    StagePart,
    numbered,
)
from shoal.training.checkpoint.read import Checkpoint, open_checkpoint
from shoal.training.checkpoint.reshape import load_stage
from shoal.training.checkpoint.write import Writer, is_full, make_room, prune, writing
from shoal.training.inner import Moments
from shoal.training.model.layout import Slot, StageLayout
from shoal.training.outer.context import Event, Offload
from shoal.training.outer.log import LOG_STATE_BYTES
from shoal.training.outer.parts import cut
from shoal.training.outer.snapshot import Snapshot
from shoal.training.spec import RunSpec

_WRITING, _SEALING = define("checkpoint.writing"), define("checkpoint.sealing")


class Keeper:
    """Belongs to one replica; `run` writes every `checkpoint.every_s`, `take` at once."""

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        layout: StageLayout,
        *,
        transport: Transport,
        folder: Path,
        snapshot: Callable[[], Awaitable[Snapshot]],
        moments: Callable[[], Awaitable[Moments | None]],
        offload: Offload,
        event: Event,
    ) -> None:
        self.folder = folder
        self._spec = spec
        self._stage = stage
        self._layout = layout
        self._transport = transport
        self._snapshot = snapshot
        self._moments = moments
        self._offload = uncut(offload)
        self._event = event
        self._kind = f"stage-{stage}"
        self._writing = asyncio.Lock()
        self._newest: Checkpoint | None = None
        self._taken_s: float | None = None
        self._last_error = ""

    async def run(self) -> None:
        """Until cancelled."""
        every_s, loop = self._spec.checkpoint.every_s, asyncio.get_running_loop()
        looked_s = loop.time()
        while every_s > 0:
            due_s = max(looked_s, self._taken_s or looked_s) + every_s  # one that was asked for counts
            if due_s > loop.time():
                await asyncio.sleep(due_s - loop.time())
                continue
            looked_s = loop.time()
            with contextlib.suppress(StorageError):  # told already; the next time then
                await self.take()

    async def take(self) -> Checkpoint:
        """A checkpoint of the log's head as it is now. Raises StorageError, and training goes on."""
        async with self._writing:
            snapshot = await self._snapshot()
            newest, head = self._newest, snapshot.state.head.hex()
            known = newest is not None and newest.manifest.parts[0].head == head
            if newest is not None and known and await self._offload(os.path.exists, newest.path):
                return newest
            try:
                self._newest = await self._write(snapshot)
            except StorageError as error:
                self._last_error = str(error)
                self._event("checkpoint-refused", {"why": self._last_error})
                raise
            self._taken_s, self._last_error = asyncio.get_running_loop().time(), ""
            self._event(
                "checkpoint",
                {
                    "what": f"stage {self._stage}",
                    "path": str(self._newest.path),
                    "height": snapshot.height,
                    "bytes": self._newest.manifest.size_bytes,
                },
            )
            return self._newest

    async def manifest_of(self, taken: Checkpoint) -> bytes:
        """For whoever asked."""
        data: bytes = await self._offload(taken.manifest_bytes)
        return data

    async def own_moments(self) -> Moments | None:
        """After a restart: the inner moments of this peer's last checkpoint of the stage, if one is whole."""
        found: Moments | None = await self._offload(self._read_moments)
        return found

    def status(self) -> dict[str, object]:
        """Figures for `shoal status`."""
        newest, now_s = self._newest, asyncio.get_running_loop().time()
        return {
            "path": str(newest.path) if newest is not None else None,
            "height": newest.manifest.parts[0].height if newest is not None else None,
            "age_s": now_s - self._taken_s if newest is not None and self._taken_s is not None else None,
            "refused": self._last_error,
        }

    async def _write(self, snapshot: Snapshot) -> Checkpoint:
        """Where there is no room beside those that are kept, the oldest goes first, if another one stays."""
        try:
            return await self._write_one(snapshot)
        except StorageError as error:
            if not is_full(error) or not await self._offload(make_room, self.folder, self._kind):
                raise
        return await self._write_one(snapshot)

    async def _write_one(self, snapshot: Snapshot) -> Checkpoint:
        moments = await self._moments()
        async with writing(self._offload, self.folder, self._kind) as writer:
            await self._offload(add_log, writer, snapshot)
            for slot in self._layout.slots:
                await point(self._transport, _WRITING)
                await self._offload(add_slot, writer, slot, snapshot, moments)
            await point(self._transport, _SEALING)
            part = stage_part(self._spec, self._transport.me, self._layout, snapshot, moments)
            await self._offload(writer.finish, self._spec, [part])
        written: Checkpoint = await self._offload(open_checkpoint, writer.path)
        await self._offload(prune, self.folder, self._kind, self._spec.checkpoint.kept)
        return written

    def _read_moments(self) -> Moments | None:
        run_id = self._spec.run_id().hex()
        try:
            paths = [path for _, path in numbered(self.folder) if path.name.endswith(f"-{self._kind}")]
        except StorageError as error:
            self._event("checkpoint-refused", {"why": str(error)})
            return None
        for path in reversed(paths):
            try:
                found = open_checkpoint(path)
                if found.manifest.run_id == run_id and found.manifest.parts[0].peer == self._transport.me:
                    return load_stage(found, self._spec, self._layout).moments
            except ShoalError as error:
                self._event("checkpoint-refused", {"why": str(error)})
        return None


def add_log(writer: Writer, snapshot: Snapshot) -> None:
    """The file of a stage's log."""
    writer.add_file(f"log.{snapshot.state.stage}.bin", [wire.encode(snapshot.state, LOG_STATE_BYTES)])


def add_slot(writer: Writer, slot: Slot, snapshot: Snapshot, moments: Moments | None) -> None:
    """The file of one parameter."""
    flat = {WEIGHTS: snapshot.anchor, MOMENTUM: snapshot.momentum}
    if moments is not None:
        flat |= {MEAN: moments.mean, SQUARE: moments.square}
    writer.add(slot.name, {kind: slot.view(tensor) for kind, tensor in flat.items()})


def stage_part(
    spec: RunSpec, peer: str, layout: StageLayout, snapshot: Snapshot, moments: Moments | None
) -> StagePart:
    """What the manifest says of the stage."""
    state = snapshot.state
    fragments = len(cut(layout.size, spec.outer.part_bytes, spec.compression.block, spec.outer.fragments))
    return StagePart(
        stage=state.stage,
        layers=(layout.layers.start, layout.layers.stop),
        tensors=(WEIGHTS, MOMENTUM, MEAN, SQUARE) if moments is not None else (WEIGHTS, MOMENTUM),
        peer=peer,
        height=state.height,
        head=state.head.hex(),
        state_root=snapshot.state_root.hex(),
        log_tokens=state.tokens // fragments,
        inner_steps=moments.steps if moments is not None else 0,
    )
