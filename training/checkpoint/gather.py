"""Gather: a whole checkpoint from one replica of each stage.

Whoever gathers asks a replica of every stage at once to write what it has now, so the heads of the stages are
those of one moment, then fetches the files. A replica that dies or whose part does not add up costs another
try with the next. The heads in the manifest are the vector that the checkpoint stands for.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from shoal.protocol.errors import MessageInvalid, NotHere, PeerSilent, ShoalError, StageEmpty, StorageError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Channel, Message, Stream, Transport
from shoal.protocol.unbroken import uncut
from shoal.training.checkpoint.fetch import checked_manifest, fetch_files
from shoal.training.checkpoint.keeper import Keeper
from shoal.training.checkpoint.manifest import (
    MANIFEST_BYTES,
    SPEC,
    Manifest,
    StagePart,
    require_sound,
)
from shoal.training.checkpoint.messages import CheckpointManifest, StillWriting, TakeCheckpoint
from shoal.training.checkpoint.read import Checkpoint, Progress, open_checkpoint, silent
from shoal.training.checkpoint.reshape import load_stage
from shoal.training.checkpoint.write import Writer, prune, writing
from shoal.training.methods import at_stage
from shoal.training.model.layout import stage_layout
from shoal.training.outer.context import GROUP_ROLES, Event, Offload
from shoal.training.outer.parts import cut
from shoal.training.outer.snapshot import snapshot_of
from shoal.training.partition import stage_ranges
from shoal.training.recovery.download import DONOR_S
from shoal.training.spec import RunSpec

KIND = "whole"
_TELL_S = 1.0
TAKE_S = 1800.0  # for a replica to write its stage, however often it says that it is at it
_STAGES_AT_ONCE = 4  # fetched; all are taken at once


def take_method(stage: int) -> str:
    """The transport method by which a replica is asked for its stage."""
    return at_stage(stage, "checkpoint")


def serve_take(keeper: Keeper, stage: int, transport: Transport) -> None:
    """Let others ask a replica for a checkpoint of its stage."""

    async def take(stream: Stream) -> None:
        await stream.receive(TakeCheckpoint)
        writing = asyncio.create_task(keeper.take())
        try:
            while not (await asyncio.wait({writing}, timeout=_TELL_S))[0]:
                await stream.send(StillWriting())
            taken = writing.result()
            await stream.send(
                CheckpointManifest(bytes.fromhex(taken.digest)), await keeper.manifest_of(taken)
            )
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    transport.serve(take_method(stage), take, GROUP_ROLES, Channel.BULK)


class Gatherer:
    """Belongs to one peer, which need not train; writes to one folder."""

    def __init__(
        self,
        spec: RunSpec,
        *,
        transport: Transport,
        replicas: Callable[[int], Sequence[PeerId]],
        folder: Path,
        offload: Offload,
        event: Event,
        rng: random.Random,
    ) -> None:
        self._spec = spec
        self._transport = transport
        self._replicas = replicas
        self._folder = folder
        self._offload = uncut(offload)
        self._event = event
        self._rng = rng
        self._one_at_a_time = asyncio.Lock()

    async def gather(self, progress: Progress = silent) -> Checkpoint:
        """Raises StageEmpty when a stage has no replica that hands its part over, StorageError."""
        async with self._one_at_a_time:
            try:
                async with writing(self._offload, self._folder, KIND) as writer:
                    found = await self._gather(writer, progress)
            except ShoalError as error:
                self._event("checkpoint-refused", {"why": str(error)})
                raise
            await self._offload(prune, self._folder, KIND, self._spec.checkpoint.kept)
            heights = [part.height for part in found.manifest.parts]
            fields = {
                "what": "all stages",
                "path": str(found.path),
                "heights": heights,
                "bytes": found.manifest.size_bytes,
            }
            self._event("checkpoint", fields)
            return found

    async def _gather(self, writer: Writer, progress: Progress) -> Checkpoint:
        fetching, counted = asyncio.Semaphore(_STAGES_AT_ONCE), _Counted(progress)
        try:
            async with asyncio.TaskGroup() as tasks:
                jobs = [
                    tasks.create_task(self._stage(stage, layers, writer, fetching, counted))
                    for stage, layers in enumerate(stage_ranges(self._spec))
                ]
        except ExceptionGroup as group:  # not `except*`: Python 3.11.2 wraps what is raised there
            raise group.exceptions[0] from None
        await self._offload(writer.finish, self._spec, [job.result() for job in jobs])
        found: Checkpoint = await self._offload(open_checkpoint, writer.path)
        return found

    async def _stage(
        self, stage: int, layers: range, writer: Writer, fetching: asyncio.Semaphore, counted: _Counted
    ) -> StagePart:
        """One stage's files, from the first replica whose part is sound."""
        reasons: list[str] = []
        tried: set[PeerId] = set()
        while left := [peer for peer in self._replicas(stage) if peer not in tried]:  # others may have come
            donor = self._rng.choice(left)
            tried.add(donor)
            try:
                digest, manifest = await self._take(stage, layers, donor)
                files = [entry for entry in manifest.files if entry.name != SPEC]
                counted.more(sum(entry.size for entry in files))
                async with fetching:
                    places = [(entry, writer.place(entry.name)) for entry in files]
                    await fetch_files(
                        self._transport, [donor], digest, places, self._offload, counted.arrived
                    )
                taken = Checkpoint(writer.unfinished, digest.hex(), manifest, self._spec)
                await self._offload(_require_root, taken, layers)
            except ShoalError as error:
                if isinstance(error, StorageError):
                    raise
                reasons.append(f"{donor}: {error}")
                continue
            for entry in files:
                writer.note(entry)
            return manifest.parts[0]
        raise StageEmpty(
            f"no replica of stage {stage} hands over its part of a checkpoint\n"
            + ("\n".join(reasons[:4]) or "none is online; see shoal status")
        )

    async def _take(self, stage: int, layers: range, donor: PeerId) -> tuple[bytes, Manifest]:
        """Have a replica write its stage; what it wrote, checked against the spec."""
        try:
            reply = await self._asked(stage, donor)
            manifest, _ = checked_manifest(donor, reply, reply.header.digest)
            require_sound(manifest, self._spec, f"the manifest from {donor}")
        except StorageError as error:  # its disk or its manifest, not ours
            raise NotHere(f"not written there: {error}") from error
        parts = [(part.stage, part.layers, bool(part.head)) for part in manifest.parts]
        if (
            parts != [(stage, (layers.start, layers.stop), True)]
            or manifest.run_id != self._spec.run_id().hex()
        ):
            raise MessageInvalid(f"a checkpoint of {donor} that is not of stage {stage} of this run")
        return reply.header.digest, manifest

    async def _asked(self, stage: int, donor: PeerId) -> Message[CheckpointManifest]:
        kinds = (StillWriting, CheckpointManifest)
        until_s = asyncio.get_running_loop().time() + TAKE_S
        async with self._transport.open(donor, take_method(stage), Channel.BULK) as stream:
            await stream.send(TakeCheckpoint(stage))
            await stream.end()
            while asyncio.get_running_loop().time() < until_s:
                try:
                    async with asyncio.timeout(DONOR_S):
                        message = await stream.receive(*kinds, max_payload_bytes=MANIFEST_BYTES)
                except TimeoutError:
                    raise PeerSilent(f"{donor} sent nothing for {DONOR_S:g} s") from None
                if isinstance(message.header, CheckpointManifest):
                    return message
        raise PeerSilent(f"{donor} was still writing after {TAKE_S:g} s")


class _Counted:
    """Bytes over all stages, for whoever watches."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = self._total = 0

    def more(self, size_bytes: int) -> None:
        self._total += size_bytes
        self._progress(self._done, self._total)

    def arrived(self, size_bytes: int) -> None:
        self._done += size_bytes
        self._progress(self._done, self._total)


def _require_root(taken: Checkpoint, layers: range) -> None:
    """Raises MessageInvalid unless anchor, momentum and log of a stage's part hash to what it announced."""
    spec, part = taken.spec, taken.manifest.parts[0]
    layout = stage_layout(spec, layers)
    try:
        state, log = load_stage(taken, spec, layout), taken.log_state(part)
    except StorageError as error:
        raise MessageInvalid(f"a part that is not what it says: {error}") from error
    fragments = cut(layout.size, spec.outer.part_bytes, spec.compression.block, spec.outer.fragments)
    if (
        log is None
        or snapshot_of(log, state.weights, state.momentum, fragments).state_root.hex() != part.state_root
    ):
        raise MessageInvalid(f"stage {part.stage}: the state root does not match the content")
