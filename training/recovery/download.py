"""Download of a snapshot from several donors at once: each chunk hashed, a donor's death costs its batch.

Where all donors fail, `Downloads` goes on later from where it came to.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from blake3 import blake3

from shoal.compression.codec import bytes_of
from shoal.protocol import wire
from shoal.protocol.errors import MessageInvalid, NotHere, PeerSilent, ProtocolViolation, ShoalError
from shoal.protocol.faults import define
from shoal.protocol.faulty_transport import point
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Channel, Message, Stream, call
from shoal.training.outer.ask_around import HURRY_S, ask_around, reasons
from shoal.training.outer.context import Context
from shoal.training.outer.log import LOG_STATE_BYTES, LogState, check_beginning
from shoal.training.outer.messages import Chunk, ChunkRequest, Manifest, ManifestRequest
from shoal.training.outer.snapshot import Snapshot, snapshot_of
from shoal.training.recovery.snapshot import CHUNK_VALUES, chunk_values, chunks_of

MANIFEST_S = 30.0
DONORS = 4  # at once
DONOR_S = 10.0  # for one message of at most 1 MiB: about 1 Mbit/s
BATCH = 8  # chunks asked for in one stream
_PLACED = define("chunk.placed")


@dataclass(frozen=True, slots=True)
class Offer:
    """A manifest, taken apart and checked for size."""

    manifest: Manifest
    hashes: tuple[bytes, ...]
    state: LogState


@dataclass(slots=True, eq=False)
class _Begun:
    """A download, and what has come of it so far."""

    hashes: tuple[bytes, ...]
    tensors: tuple[torch.Tensor, torch.Tensor]
    missing: dict[int, None]  # in order

    @classmethod
    def of(cls, context: Context, offer: Offer) -> _Begun:
        """Nothing yet."""
        anchor, momentum = (torch.empty(context.size, dtype=torch.float32) for _ in range(2))
        return cls(offer.hashes, (anchor, momentum), dict.fromkeys(range(len(offer.hashes))))


class Downloads:
    """One after another; what has come is kept, in part or whole, for the next attempt at the same bytes: the
    entries after a snapshot may fail to come."""

    def __init__(self, context: Context) -> None:
        self.chunks = 0  # that have come
        self._context = context
        self._begun: _Begun | None = None

    async def run(self, offer: Offer, donors: Sequence[PeerId]) -> Snapshot:
        """As `download`."""
        if self._begun is None or self._begun.hashes != offer.hashes:
            self._begun = _Begun.of(self._context, offer)
        begun, missed = self._begun, len(self._begun.missing)
        try:
            return await download(self._context, offer, donors, begun)
        except ShoalError:
            if not begun.missing:  # wrong as a whole
                self._begun = None
            raise
        finally:
            self.chunks += missed - len(begun.missing)

    def forget(self) -> None:
        """What has come is not needed any more."""
        self._begun = None


async def ask_manifest(context: Context, donor: PeerId, height: int) -> Offer:
    """What a donor offers for a height (0: its newest). Raises NotHere and what `call` raises."""
    count = 2 * chunks_of(context.size)
    reply = await call(
        context.transport,
        donor,
        context.method("manifest"),
        ManifestRequest(height),
        Manifest,
        timeout_s=MANIFEST_S,
        max_payload_bytes=32 * count + LOG_STATE_BYTES,
        channel=Channel.BULK,
    )
    manifest, payload = reply.header, bytes(reply.payload)
    sizes = (manifest.chunk_bytes, manifest.size_bytes, 32 * count + manifest.state_bytes)
    if sizes != (4 * CHUNK_VALUES, 8 * context.size, len(payload)):
        raise MessageInvalid(f"manifest of {donor}: sizes {sizes} do not fit this stage")
    state = wire.decode(LogState, payload[32 * count :], LOG_STATE_BYTES)
    if (state.stage, state.height, state.head) != (context.stage, manifest.height, manifest.head):
        raise MessageInvalid(f"manifest of {donor}: its log state is of another height or stage")
    check_beginning(context.run_id, state)
    return Offer(manifest, tuple(payload[32 * i : 32 * i + 32] for i in range(count)), state)


async def newest_offer(context: Context, donors: Sequence[PeerId]) -> tuple[Offer, list[PeerId]]:
    """What the first donor that answers has, and the donors from that one on: who was asked before it gave no
    answer, and would be waited for again. Raises NotHere."""

    async def ask(donor: PeerId) -> tuple[Offer, PeerId]:
        return await ask_manifest(context, donor, 0), donor

    found, failures = await ask_around(context, donors, ask)
    if found is None:
        raise NotHere(f"a snapshot of stage {context.stage}: {reasons(failures)}")
    offer, giver = found
    at = list(donors).index(giver)
    return offer, [*donors[at:], *donors[:at]]


async def download(
    context: Context, offer: Offer, donors: Sequence[PeerId], begun: _Begun | None = None
) -> Snapshot:
    """All chunks of a snapshot, verified. Raises NotHere when every donor failed before the end.

    `begun`: an earlier attempt at the very same one, to go on with.
    """
    begun = begun or _Begun.of(context, offer)
    tensors, missing = begun.tensors, begun.missing
    waiting, asked, failed = list(donors)[::-1], set[int](), list[str]()

    async def next_batch() -> list[int]:
        """What nobody was asked for yet; else what others owe for a while: they may stand still, or drip."""
        if not missing:
            return []
        if free := list(itertools.islice((index for index in missing if index not in asked), BATCH)):
            return free
        await asyncio.sleep(HURRY_S)
        return context.rng.sample(list(missing), min(BATCH, len(missing)))

    async def work(donor: PeerId) -> None:
        while batch := await next_batch():
            asked.update(batch)
            try:
                await _fetch(context, offer, donor, batch, begun)
            finally:
                asked.difference_update(batch)

    async def work_on() -> None:
        """With one donor after the other, as long as each gives what it is asked for."""
        while missing and waiting:
            donor = waiting.pop()
            try:
                await work(donor)
            except ShoalError as error:
                failed.append(f"{donor}: {error}")
                if isinstance(error, ProtocolViolation):
                    context.refuse(donor, str(error))
        if not missing:
            for worker in workers:
                if worker is not asyncio.current_task():
                    worker.cancel()

    async with asyncio.TaskGroup() as tasks:
        workers = [tasks.create_task(work_on()) for _ in donors[:DONORS]]
    if missing:
        raise NotHere(f"{len(missing)} of {len(offer.hashes)} chunks not found: {'; '.join(failed[:4])}")
    snapshot: Snapshot = await context.offload(
        snapshot_of, offer.state, tensors[0], tensors[1], context.fragments
    )
    if snapshot.state_root != offer.manifest.state_root:
        raise MessageInvalid("the snapshot's chunks fit their hashes, and not its state root")
    return snapshot


async def _fetch(context: Context, offer: Offer, donor: PeerId, batch: Sequence[int], begun: _Begun) -> None:
    """Fetch a batch; what has arrived is not missing any more."""
    manifest = offer.manifest
    async with context.transport.open(donor, context.method("chunks"), Channel.BULK) as stream:
        await stream.send(ChunkRequest(manifest.height, manifest.state_root, tuple(batch)))
        await stream.end()
        for index in batch:
            message = await receive_soon(stream, Chunk, manifest.chunk_bytes)
            which, start, count = chunk_values(context.size, index)
            if message.header.index != index or len(message.payload) != 4 * count:
                raise MessageInvalid(
                    f"chunk {message.header.index} of {len(message.payload)} bytes for {index}"
                )
            await context.offload(
                _place, offer.hashes[index], message.payload, begun.tensors[which], start, count
            )
            await point(context.transport, _PLACED)
            begun.missing.pop(index, None)


async def receive_soon(
    stream: Stream, kind: type[Any], max_payload_bytes: int, within_s: float = DONOR_S
) -> Message[Any]:
    """The next message of a donor that has all it sends at hand. Raises PeerSilent when it does not begin."""
    try:
        async with asyncio.timeout(within_s):
            return await stream.receive(kind, max_payload_bytes=max_payload_bytes)
    except TimeoutError:
        raise PeerSilent(f"{stream.remote.peer} sent nothing for {within_s:g} s") from None


def _place(digest: bytes, data: memoryview, tensor: torch.Tensor, start: int, count: int) -> None:
    if blake3(data).digest() != digest:
        raise MessageInvalid("a chunk that does not fit its hash")
    bytes_of(tensor[start : start + count])[:] = data
