"""A transport with fault points, for tests: passes everything on, and every message through its points.

What the points are and what can happen there: `faults`. Test worlds, simulated and of real processes, wrap
the transport of each peer; `point` is called where a step is worth a fault though no message passes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Any

from shoal.protocol import wire
from shoal.protocol.errors import MessageInvalid, StreamBroken
from shoal.protocol.faults import Action, Faults
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import (
    Buffer,
    Channel,
    Handler,
    Message,
    Stream,
    Transport,
    TransportCounters,
)

_FLIPPED_MOST = 8  # bits
_TRIES = 32  # to find a damaged header that its own bounds admit


class FaultyTransport(Transport):
    """Passes everything on, and every message through its points."""

    def __init__(self, inner: Transport, faults: Faults) -> None:
        self.me = inner.me
        self.faults = faults
        self._inner = inner
        inner.on_trouble = self._tell

    def serve(
        self, method: str, handler: Handler, roles: frozenset[Role], channel: Channel = Channel.CONTROL
    ) -> None:
        async def wrapped(stream: Stream) -> None:
            faulty = _FaultyStream(stream, self.me, self.faults)
            await handler(faulty)
            faulty.require_whole()

        self._inner.serve(method, wrapped, roles, channel)

    def withdraw(self, methods: Collection[str]) -> None:
        self._inner.withdraw(methods)

    @property
    def methods(self) -> frozenset[str]:
        return self._inner.methods

    @asynccontextmanager
    async def open(
        self, peer: PeerId, method: str, channel: Channel = Channel.CONTROL
    ) -> AsyncIterator[Stream]:
        async with self._inner.open(peer, method, channel) as stream:
            faulty = _FaultyStream(stream, self.me, self.faults)
            yield faulty
            faulty.require_whole()

    async def start(self) -> None:
        await self._inner.start()

    async def close(self) -> None:
        await self._inner.close()

    async def disconnect(self, peer: PeerId) -> None:
        await self._inner.disconnect(peer)

    def counters(self) -> TransportCounters:
        return self._inner.counters()

    def uplink_bytes_per_s(self) -> float | None:
        return self._inner.uplink_bytes_per_s()


async def point(transport: Transport, step: str) -> None:
    """Pass a step: nothing, unless the peer's transport was wrapped by a test."""
    if isinstance(transport, FaultyTransport):
        await transport.faults.passing(step, transport.me)


class _FaultyStream(Stream):
    def __init__(self, inner: Stream, me: PeerId, faults: Faults) -> None:
        self.remote = inner.remote
        self._inner = inner
        self._me = me
        self._faults = faults
        self._mute = False  # nothing more reaches the other side
        self._deaf = False  # nor this one
        self._kept: Message[Any] | None = None  # arrived, and its receiver was cancelled at the point

    async def send(self, header: object, payload: Buffer = b"") -> None:
        suffered = await self._passing(header, "sending") if self._faults.armed else None
        if suffered is Action.CORRUPT:
            header, payload = corrupted(header, payload, self._faults.rng)
        if self._faults.tamper is not None:
            header, payload = self._faults.tamper(self._me, header, payload)
        self._mute |= suffered is Action.DROP
        if not self._mute:
            await self._inner.send(header, payload)
        if self._faults.armed:
            self._mute |= await self._passing(header, "sent") is Action.DROP

    async def receive(self, *kinds: type[Any], max_payload_bytes: int = 0) -> Message[Any]:
        suffered: Action | None = None
        if self._kept is None and not self._deaf:
            self._kept = await self._inner.receive(*kinds, max_payload_bytes=max_payload_bytes)
            if self._faults.armed:
                suffered = await self._passing(self._kept.header, "received")
        if suffered is Action.DROP or self._kept is None:
            self._deaf, self._kept = True, None
            for_ever: asyncio.Future[Message[Any]] = asyncio.get_running_loop().create_future()
            return await for_ever  # the caller's deadline, or the end of the stream, cancels it
        message, self._kept = self._kept, None
        if suffered is Action.CORRUPT:
            header, payload = corrupted(message.header, message.payload, self._faults.rng)
            return Message(header, memoryview(payload))
        return message

    async def end(self) -> None:
        if not self._mute:
            await self._inner.end()

    def require_whole(self) -> None:
        """An END after a gap would be a lie: a stream that lost something breaks instead."""
        if self._mute:
            raise StreamBroken(f"what this side sent to {self.remote.peer} was lost on the way")

    async def _passing(self, header: object, place: str) -> Action | None:
        return await self._faults.passing(f"{type(header).__name__}.{place}", self._me, self.remote.peer)


def corrupted(header: object, payload: Buffer, rng: random.Random) -> tuple[object, Buffer]:
    """A damaged message: its payload cut short or with some bits flipped; without payload, its header.

    A header without anything to damage gets a payload that nobody asked for.
    """
    if memoryview(payload).nbytes:
        data = bytearray(payload)
        if rng.random() < 0.5:
            return header, data[: rng.randrange(len(data))]
        for _ in range(rng.randint(1, _FLIPPED_MOST)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return header, data
    return (damaged, b"") if (damaged := _damaged(header, rng)) is not None else (header, b"\0")


def _damaged(header: Any, rng: random.Random) -> object | None:
    """A header of the same class, one field changed, still within bounds; None when none is found."""
    names = [field.name for field in dataclasses.fields(header)]
    for _ in range(_TRIES if names else 0):
        name = rng.choice(names)
        try:
            damaged: object = dataclasses.replace(header, **{name: _changed(getattr(header, name), rng)})
            wire.encode(damaged)
        except (MessageInvalid, ValueError):
            continue
        if damaged != header:
            return damaged
    return None


def _changed(value: object, rng: random.Random) -> object:
    match value:
        case bool():
            return not value
        case int():
            return value ^ (1 << rng.randrange(16))
        case float():
            return value * 2.0 ** rng.randint(-8, 8)
        case bytes() if value:
            at = rng.randrange(len(value))
            return value[:at] + bytes([value[at] ^ (1 << rng.randrange(8))]) + value[at + 1 :]
        case str() | tuple():
            return value[:-1]
    return value
