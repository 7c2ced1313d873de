"""Faults at named messages: a transport that lets a test kill, freeze or tamper when a message passes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Buffer, Channel, Handler, Message, Stream, Transport

# (peer, "before" | "after" sending or "receiving", header) -> what to do at this point
Hook = Callable[[PeerId, str, object], Awaitable[None]]
Tamper = Callable[[PeerId, object, Buffer], tuple[object, Buffer]]


class FaultyTransport(Transport):
    """Passes everything on, and tells the hook first."""

    def __init__(self, inner: Transport, faults: Faults) -> None:
        self.me = inner.me
        self._inner = inner
        self._faults = faults

    def serve(self, method: str, handler: Handler, roles: frozenset[Role]) -> None:
        async def wrapped(stream: Stream) -> None:
            await handler(_FaultyStream(stream, self.me, self._faults))

        self._inner.serve(method, wrapped, roles)

    @asynccontextmanager
    async def open(
        self, peer: PeerId, method: str, channel: Channel = Channel.CONTROL
    ) -> AsyncIterator[Stream]:
        async with self._inner.open(peer, method, channel) as stream:
            yield _FaultyStream(stream, self.me, self._faults)

    async def start(self) -> None:
        await self._inner.start()

    async def close(self) -> None:
        await self._inner.close()

    async def disconnect(self, peer: PeerId) -> None:
        await self._inner.disconnect(peer)

    def counters(self) -> Any:
        return self._inner.counters()


class _FaultyStream(Stream):
    def __init__(self, inner: Stream, me: PeerId, faults: Faults) -> None:
        self.remote = inner.remote
        self._inner = inner
        self._me = me
        self._faults = faults

    async def send(self, header: object, payload: Buffer = b"") -> None:
        await self._faults.hook(self._me, "before", header)
        header, payload = self._faults.tamper(self._me, header, payload)
        await self._inner.send(header, payload)
        await self._faults.hook(self._me, "after", header)

    async def receive(self, *kinds: type[Any], max_payload_bytes: int = 0) -> Message[Any]:
        message = await self._inner.receive(*kinds, max_payload_bytes=max_payload_bytes)
        await self._faults.hook(self._me, "receiving", message.header)
        return message

    async def end(self) -> None:
        await self._inner.end()


class Faults:
    """What is armed. `strike` is called once, when `kind` passes for the `count`-th time at `point`."""

    def __init__(self) -> None:
        self.hit: PeerId | None = None
        self.tamper: Tamper = lambda peer, header, payload: (header, payload)
        self._armed: tuple[type, str, int] | None = None
        self._strike: Callable[[PeerId], None] = lambda peer: None
        self._who: PeerId | None = None
        self.hangs = True
        self._awake: asyncio.Future[None] | None = None

    def wrap(self, transport: Transport) -> Transport:
        return FaultyTransport(transport, self)

    def arm(
        self,
        kind: type,
        point: str,
        strike: Callable[[PeerId], None],
        *,
        count: int = 1,
        who: PeerId | None = None,
    ) -> None:
        self._armed, self._strike, self._who = (kind, point, count), strike, who

    def disarm(self) -> None:
        """Nothing strikes any more."""
        self._armed = None

    async def hook(self, peer: PeerId, point: str, header: object) -> None:
        if self._armed is None or not isinstance(header, self._armed[0]) or point != self._armed[1]:
            return
        if self._who not in (None, peer):
            return
        kind, _, count = self._armed
        if count > 1:
            self._armed = (kind, point, count - 1)
            return
        self._armed, self.hit = None, peer
        self._strike(peer)
        if self.hangs:
            # The process runs no further: it is cancelled, or woken.
            self._awake = asyncio.get_running_loop().create_future()
            await self._awake

    def wake(self) -> None:
        """A frozen process goes on."""
        if self._awake is not None and not self._awake.done():
            self._awake.set_result(None)
