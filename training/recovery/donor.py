"""Donor: hands snapshots to joiners, and parts of its state to who has lost them.

Any replica is one; a joiner asks several at once.
"""

from __future__ import annotations

import asyncio

from shoal.compression.codec import bytes_of
from shoal.protocol import wire
from shoal.protocol.errors import MessageInvalid, Stale
from shoal.protocol.transport import Channel, Stream
from shoal.training.outer.context import GROUP_ROLES, Context
from shoal.training.outer.log import LOG_STATE_BYTES
from shoal.training.outer.messages import (
    Chunk,
    ChunkRequest,
    Manifest,
    ManifestRequest,
    StateDigests,
    StatePart,
    StateRequest,
)
from shoal.training.outer.replica import Replica
from shoal.training.outer.snapshot import Snapshot
from shoal.training.recovery.snapshot import CHUNK_VALUES, chunk, chunk_hashes, chunks_of
from shoal.training.recovery.snapshots import Snapshots


class Donor:
    """Serves methods "manifest", "chunks" and "state" of a stage's group."""

    def __init__(self, context: Context, replica: Replica, snapshots: Snapshots) -> None:
        self._context = context
        self._replica = replica
        self._snapshots = snapshots
        self._hashed: dict[tuple[int, bytes], bytes] = {}  # height and state root -> of all chunks
        self._hashing = asyncio.Lock()

    def serve(self) -> None:
        """Register; the transport owns the handlers' tasks."""
        transport, method = self._context.transport, self._context.method
        transport.serve(method("manifest"), self._manifest, GROUP_ROLES, Channel.BULK)
        transport.serve(method("chunks"), self._chunks, GROUP_ROLES, Channel.BULK)
        transport.serve(method("state"), self._state, GROUP_ROLES, Channel.BULK)

    async def _manifest(self, stream: Stream) -> None:
        request = (await stream.receive(ManifestRequest)).header
        snapshot = self._snapshots.near(request.height or self._snapshots.newest_height)
        hashes = await self._hashes_of(snapshot)
        state = wire.encode(snapshot.state, LOG_STATE_BYTES)
        await stream.send(
            Manifest(
                snapshot.height,
                snapshot.state.head,
                snapshot.state_root,
                4 * CHUNK_VALUES,
                8 * snapshot.anchor.numel(),
                len(state),
            ),
            hashes + state,
        )

    async def _hashes_of(self, snapshot: Snapshot) -> bytes:
        """Once for all who ask: of gigabytes it takes longer than a joiner waits before it asks others."""
        name = snapshot.height, snapshot.state_root
        async with self._hashing:
            if name not in self._hashed:
                hashes = await self._context.offload(chunk_hashes, snapshot)
                kept = {
                    key: known for key, known in self._hashed.items() if key[0] in self._snapshots.heights
                }
                self._hashed = kept | {name: hashes}
            return self._hashed[name]

    async def _chunks(self, stream: Stream) -> None:
        request = (await stream.receive(ChunkRequest)).header
        snapshot = self._snapshots.get(request.height)
        if snapshot.state_root != request.state_root:
            raise Stale(f"the snapshot of height {request.height} here is of another chain")
        count = 2 * chunks_of(snapshot.anchor.numel())
        for index in request.chunks:
            if index >= count:
                raise MessageInvalid(f"chunk {index} of {count}")
            await stream.send(Chunk(index), chunk(snapshot, index))

    async def _state(self, stream: Stream) -> None:
        """Digests of all parts at the head, or some parts: of this very state or not at all."""
        request = (await stream.receive(StateRequest)).header
        parts = {part.index: part for fragment in self._context.fragments for part in fragment.parts}
        if not request.parts:
            digests = await self._replica.digests()
            self._require(request)
            await stream.send(StateDigests(), b"".join(digests))
        for index in request.parts:
            if index not in parts:
                raise MessageInvalid(f"part {index} of {len(parts)}")
            self._require(request)
            tensors = self._replica.part_state(parts[index])
            data = await self._context.offload(b"".join, [bytes_of(tensor) for tensor in tensors])
            await stream.send(StatePart(index), data)

    def _require(self, request: StateRequest) -> None:
        if (self._replica.log.head, self._replica.state_root) != (request.head, request.state_root):
            raise Stale("this replica has gone on from that head, or does not share that state")
