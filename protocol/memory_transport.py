"""The memory twin of the transport: the same streams, rules and errors over a `Network` in memory.

    network = MemoryNetwork(seed, Link(latency_s=0.05))
    transport = network.transport(peer, frozenset({Role.TRAINER}))

Used by tests and the simulator. Peers are who they say they are; everything else (framing, roles, caps,
back-pressure, deadlines, END) is the code that the real transport runs.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from shoal.protocol.errors import PeerUnreachable, UsageError
from shoal.protocol.framed_stream import FramedStream
from shoal.protocol.identity import PeerId, Role, VerifiedPeer
from shoal.protocol.limits import CONNECT_S
from shoal.protocol.memory_network import Link as Link
from shoal.protocol.memory_network import Network, Route
from shoal.protocol.memory_pipe import MemoryPipe
from shoal.protocol.progress import Pulse
from shoal.protocol.service import Service
from shoal.protocol.session import Sessions
from shoal.protocol.transport import Channel, Handler, Stream, Transport, TransportCounters
from shoal.protocol.uplink import Uplink

_OPEN_BYTES = 200  # about what the headers of a request take
_HELLO_BYTES = 1500  # one leg of a handshake with certificates


class MemoryNetwork(Network):
    """The network and its transports."""

    def __init__(self, rng: random.Random | int = 0, link: Link | None = None) -> None:
        super().__init__(rng, link)
        self._transports: dict[PeerId, MemoryTransport] = {}

    def transport(
        self,
        peer: PeerId,
        roles: frozenset[Role] = frozenset(Role),
        token_id: str = "",
        upload_bytes_per_s: float | None = None,
    ) -> MemoryTransport:
        """A transport for `peer`; one that was killed or closed may come back under its name."""
        if peer in self._transports:
            raise UsageError(f"{peer} is on this network already")
        verified = VerifiedPeer(peer, roles, token_id or peer, float("inf"))
        self._transports[peer] = MemoryTransport(self, verified, upload_bytes_per_s)
        return self._transports[peer]

    def kill(self, peer: PeerId) -> None:
        """The process is gone: its streams break at once, on both sides, and it can no longer be dialled."""
        gone = self._transports.pop(peer, None)
        if gone is not None:
            gone.vanish()
        for transport in list(self._transports.values()):
            transport.drop(peer, "it died")
        self.thaw(peer)

    def listening(self, peer: PeerId) -> MemoryTransport | None:
        """The transport of `peer`, if it has started and not closed."""
        transport = self._transports.get(peer)
        return transport if transport is not None and transport.started else None

    def remove(self, transport: MemoryTransport) -> None:
        """A transport closed; a peer of that name may come again."""
        if self._transports.get(transport.me) is transport:
            del self._transports[transport.me]

    def connection_lost(self, one: PeerId, other: PeerId) -> None:
        for peer, remote in ((one, other), (other, one)):
            if peer in self._transports:
                self._transports[peer].drop(remote, "keepalive got no answer")


class MemoryTransport(Transport):
    """One peer's transport. Made by `MemoryNetwork.transport`."""

    def __init__(
        self, network: MemoryNetwork, verified: VerifiedPeer, upload_bytes_per_s: float | None = None
    ) -> None:
        self.me = verified.peer
        self.verified = verified
        self.started = False
        self._network = network
        self._uplink = Uplink(upload_bytes_per_s)
        self._service = Service()
        self._sessions = Sessions()
        self._connections: dict[tuple[PeerId, Channel], Pulse] = {}
        self._pipes: dict[MemoryPipe, None] = {}
        self._serving: dict[asyncio.Task[None], None] = {}

    def serve(
        self, method: str, handler: Handler, roles: frozenset[Role], channel: Channel = Channel.CONTROL
    ) -> None:
        self._service.register(method, handler, roles, channel)

    def withdraw(self, methods: Collection[str]) -> None:
        self._service.withdraw(methods)

    @property
    def methods(self) -> frozenset[str]:
        return self._service.methods

    async def start(self) -> None:
        self.started = True

    def open(
        self, peer: PeerId, method: str, channel: Channel = Channel.CONTROL
    ) -> AbstractAsyncContextManager[Stream]:
        return self._open(peer, method, channel)

    async def close(self) -> None:
        self.started = False
        self._network.remove(self)
        for pipe in list(self._pipes):
            pipe.break_off()
        await self._service.cancel()
        await self._sessions.close()
        if self._serving:
            await asyncio.wait(list(self._serving))

    async def disconnect(self, peer: PeerId) -> None:
        self._forget(peer)
        for pipe in list(self._pipes):
            if pipe.there == peer:
                pipe.break_off()
        await self._service.cancel(peer)

    def counters(self) -> TransportCounters:
        return self._service.counters(self._sessions.count)

    def uplink_bytes_per_s(self) -> float | None:
        return self._uplink.bytes_per_s()

    def vanish(self) -> None:
        """Die without a word; for `MemoryNetwork.kill`."""
        self.started = False
        for pipe in list(self._pipes):
            pipe.fail("this process was killed")
        for task in list(self._serving):
            task.cancel()

    def drop(self, peer: PeerId, reason: str) -> None:
        """The connections with `peer` are dead: break their streams, which cancels what serves them."""
        self._forget(peer)
        for pipe in list(self._pipes):
            if pipe.there == peer:
                pipe.fail(f"the connection was lost: {reason}")

    def accept(self, pipe: MemoryPipe, method: str, caller: VerifiedPeer, pulse: Pulse) -> None:
        """A stream that another peer opened has arrived."""
        if pipe.other.broken is not None:
            return
        traffic = self._service.traffic(method)
        outlet = self._uplink.outlet(self._service.channel(method), to_itself=caller.peer == self.me)
        stream = FramedStream(
            caller, pipe, traffic, pulse, outlet, partial(self._tell_of_caller, caller.peer)
        )
        self._pipes[pipe] = None
        task = asyncio.create_task(self._serve(method, stream, pipe), name=f"stream {method}")
        self._serving[task] = None
        task.add_done_callback(self._serving.pop)
        pipe.on_broken = partial(_cancel, task)

    async def _serve(self, method: str, stream: FramedStream, pipe: MemoryPipe) -> None:
        try:
            await self._service.answer(method, stream)
            pipe.finish()
        finally:
            self._pipes.pop(pipe, None)
            await stream.release()

    @asynccontextmanager
    async def _open(self, peer: PeerId, method: str, channel: Channel) -> AsyncIterator[Stream]:
        remote, pulse = await self._connect(peer, channel)
        pipe = MemoryPipe.pair(self._network, self.me, peer, channel, method, pulse.moved)
        request = partial(self._request, pipe.other, method, pulse)
        self._network.route(self.me, peer, channel).push(_OPEN_BYTES, request)
        traffic = self._service.traffic(method, opened_here=True)
        outlet = self._uplink.outlet(channel, to_itself=peer == self.me)
        stream = FramedStream(
            remote, pipe, traffic, pulse, outlet, partial(self._tell, peer), opened_here=True
        )
        self._pipes[pipe] = None
        async with self._sessions.run(stream, partial(self._pipes.pop, pipe)):
            yield stream

    def _request(self, pipe: MemoryPipe, method: str, pulse: Pulse) -> None:
        """The request reaches the other side, or the place where that was."""
        transport = self._network.listening(pipe.here)
        if transport is None:
            pipe.other.fail("it listens no more")
        else:
            transport.accept(pipe, method, self.verified, pulse)

    async def _connect(self, peer: PeerId, channel: Channel) -> tuple[VerifiedPeer, Pulse]:
        """Two round trips (TCP, TLS 1.3), unless there is a connection."""
        transport = self._network.listening(peer)
        if transport is None or (peer, channel) not in self._connections:
            try:
                async with asyncio.timeout(CONNECT_S):
                    transport = await self._shake_hands(peer, channel)
            except TimeoutError:
                raise self._unreachable(peer, f"no answer within {CONNECT_S:g} s") from None
        pulse = self._connections.setdefault((peer, channel), Pulse())
        return transport.verified, pulse

    async def _shake_hands(self, peer: PeerId, channel: Channel) -> MemoryTransport:
        there = self._network.route(self.me, peer, channel)
        back = self._network.route(peer, self.me, channel)
        for _ in range(2):
            await _crossed(there)
            if self._network.listening(peer) is None:
                raise self._unreachable(peer, "connection refused")
            await _crossed(back)
        transport = self._network.listening(peer)
        if transport is None:
            raise self._unreachable(peer, "connection reset")
        return transport

    def _unreachable(self, peer: PeerId, reason: str) -> PeerUnreachable:
        error = PeerUnreachable(f"{peer} cannot be dialled: {reason}")
        self._tell(peer, error)
        return error

    def _forget(self, peer: PeerId) -> None:
        for channel in Channel:
            self._connections.pop((peer, channel), None)


async def _crossed(route: Route) -> None:
    arrived = asyncio.Event()
    route.push(_HELLO_BYTES, arrived.set)
    await arrived.wait()


def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
