"""Donor: hands snapshots to joiners. Any replica is one; a joiner asks several at once."""

from __future__ import annotations

from shoal.protocol import wire
from shoal.protocol.errors import MessageInvalid, Stale
from shoal.protocol.transport import Stream
from shoal.training.outer.context import GROUP_ROLES, Context
from shoal.training.outer.log import LOG_STATE_BYTES
from shoal.training.outer.messages import Chunk, ChunkRequest, Manifest, ManifestRequest
from shoal.training.recovery.snapshot import CHUNK_VALUES, chunk, chunk_hashes, chunks_of
from shoal.training.recovery.snapshots import Snapshots


class Donor:
    """Serves methods "manifest" and "chunks" of a stage's group."""

    def __init__(self, context: Context, snapshots: Snapshots) -> None:
        self._context = context
        self._snapshots = snapshots

    def serve(self) -> None:
        """Register; the transport owns the handlers' tasks."""
        transport, method = self._context.transport, self._context.method
        transport.serve(method("manifest"), self._manifest, GROUP_ROLES)
        transport.serve(method("chunks"), self._chunks, GROUP_ROLES)

    async def _manifest(self, stream: Stream) -> None:
        request = (await stream.receive(ManifestRequest)).header
        snapshot = self._snapshots.get(request.height)
        hashes = await self._context.offload(chunk_hashes, snapshot)
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
