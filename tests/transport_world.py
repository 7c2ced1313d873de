"""Both transports behind one scene: two peers and a bystander, on gRPC over loopback or in memory.

Used by the transport tests. `play("grpc" | "memory", scene, folder)` runs `scene(world)` to its end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trust_world import World as TrustWorld

from shoal.protocol import virtual_time
from shoal.protocol.admission import JoinToken, Membership
from shoal.protocol.contacts import ContactBook
from shoal.protocol.errors import ShoalError, StreamEnded
from shoal.protocol.grpc_transport import GrpcTransport
from shoal.protocol.identity import Contact, PeerId, PeerKey, Role
from shoal.protocol.memory_transport import Link, MemoryNetwork
from shoal.protocol.transport import Stream, Transport
from shoal.protocol.wire import Count, Text, wire_message

TWINS = ("grpc", "memory")
ANYBODY = frozenset(Role)
ROOM = 64 << 20  # payload bytes that the handlers here admit


@wire_message
@dataclass(frozen=True, slots=True)
class Note:
    """A message of the transport tests."""

    number: Count
    text: Text = ""


@wire_message
@dataclass(frozen=True, slots=True)
class OtherNote:
    """A message that no handler here expects."""

    number: Count


async def echo(stream: Stream) -> None:
    """Sends everything back until the caller's END."""
    while True:
        try:
            message = await stream.receive(Note, max_payload_bytes=ROOM)
        except StreamEnded:
            return
        await stream.send(message.header, message.payload)


class Peers:
    """Alice calls, Bob serves; more peers on demand. `make` gives a transport that is not started yet."""

    def __init__(self, make: Callable[[frozenset[Role]], Transport]) -> None:
        self.make = make
        self.alice = make(frozenset({Role.TRAINER}))
        self.bob = make(frozenset({Role.TRAINER}))
        self.troubles: list[tuple[PeerId, ShoalError]] = []
        self.alice.on_trouble = lambda peer, error: self.troubles.append((peer, error))
        self._started: list[Transport] = []
        self.learn: Callable[[Transport], None] = lambda transport: None

    def serve(self, method: str, handler: Callable[[Stream], Awaitable[None]]) -> None:
        """Bob answers `method` for everybody."""
        self.bob.serve(method, handler, ANYBODY)

    async def start(self, *transports: Transport) -> None:
        """Start these (default: Alice and Bob) and let everybody know their addresses."""
        for transport in transports or (self.alice, self.bob):
            await transport.start()
            self._started.append(transport)
            self.learn(transport)

    async def close(self) -> None:
        for transport in self._started:
            await transport.close()


Scene = Callable[[Peers], Coroutine[Any, Any, None]]


def play(twin: str, scene: Scene, folder: Path) -> None:
    """Run a scene on one of the twins."""
    if twin == "memory":
        virtual_time.run(_staged(scene, memory_peers()))
    else:
        asyncio.run(_staged(scene, grpc_peers(folder)))


def memory_peers(link: Link | None = None) -> Peers:
    """Peers on a network in memory."""
    network = MemoryNetwork(1, link)
    numbers = iter(range(1000))

    def make(roles: frozenset[Role]) -> Transport:
        return network.transport(PeerId(f"peer-{next(numbers)}"), roles)

    return Peers(make)


def grpc_peers(folder: Path) -> Peers:
    """Peers on loopback sockets, each with a token of its own in one run."""
    run = Run(folder)
    peers = Peers(lambda roles: run.transport(*sorted(roles)))
    peers.learn = run.learn
    return peers


class Run:
    """A run on loopback: its trust, its contact book, and transports made in one line."""

    def __init__(self, folder: Path, run_id: bytes = bytes(32)) -> None:
        self.trust = TrustWorld(folder / run_id.hex(), run_id, time.time())
        self.contacts = ContactBook()
        self.memberships: dict[PeerId, Membership] = {}
        self._transports: list[GrpcTransport] = []

    async def close(self) -> None:
        for transport in self._transports:
            await transport.close()

    async def started(self, member: Membership | None = None) -> GrpcTransport:
        """A peer that echoes, with its contact in everybody's book; `close` closes it."""
        transport = self.transport(member=member)
        transport.serve("echo", echo, ANYBODY)
        await transport.start()
        self.learn(transport)
        return transport

    def member(self, *roles: Role, token: JoinToken | None = None) -> Membership:
        token = token or self.trust.token(*(roles or (Role.TRAINER,)))
        member = Membership(token, PeerKey.generate(), lambda: self.trust.now)
        self.memberships[member.me.peer] = member
        return member

    def transport(
        self,
        *roles: Role,
        member: Membership | None = None,
        port: int = 0,
        upload_bytes_per_s: float | None = None,
    ) -> GrpcTransport:
        member = member or self.member(*roles)
        made = GrpcTransport(member, self.contacts, "127.0.0.1", port, upload_bytes_per_s)
        self._transports.append(made)
        return made

    def learn(self, transport: Transport) -> None:
        if isinstance(transport, GrpcTransport):
            self.learn_contact(transport.me, transport.port)

    def learn_contact(self, peer: PeerId, *ports: int) -> None:
        addresses = tuple(f"127.0.0.1:{port}" for port in ports)
        self.contacts.learn(Contact(peer, addresses, self.memberships[peer].chain))


@asynccontextmanager
async def other_process(run: Run) -> AsyncIterator[tuple[PeerId, asyncio.subprocess.Process]]:
    """A peer in a process of its own that serves `echo`, `swallow` and `half`; to be killed or stopped."""
    token = run.trust.token(Role.TRAINER)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, token.encode()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    if process.stdout is None:
        raise RuntimeError("no pipe")
    try:
        peer, port, chain = json.loads(await process.stdout.readline())
        run.contacts.learn(Contact(peer, (f"127.0.0.1:{port}",), tuple(bytes.fromhex(der) for der in chain)))
        yield peer, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def play_run(scene: Callable[[Run], Coroutine[Any, Any, None]], folder: Path) -> None:
    """Run a scene on loopback and close every transport it made."""

    async def staged() -> None:
        run = Run(folder)
        try:
            async with asyncio.timeout(60):
                await scene(run)
        finally:
            await run.close()

    asyncio.run(staged())


async def _staged(scene: Scene, peers: Peers) -> None:
    try:
        async with asyncio.timeout(60):
            await scene(peers)
    finally:
        await peers.close()


async def _half(stream: Stream) -> None:
    """Begins a message that is larger than any window, and so never completes it unless it is read."""
    await stream.receive(Note)
    await stream.send(Note(1), bytes(ROOM))


async def _swallow(stream: Stream) -> None:
    await stream.receive(Note, max_payload_bytes=ROOM)
    await asyncio.Event().wait()


async def _serve_alone(token: str) -> None:
    member = Membership(JoinToken.parse(token), PeerKey.generate(), time.time)
    transport = GrpcTransport(member, ContactBook(), "127.0.0.1")
    for method, handler in (("echo", echo), ("half", _half), ("swallow", _swallow)):
        transport.serve(method, handler, ANYBODY)
    await transport.start()
    print(json.dumps([transport.me, transport.port, [der.hex() for der in member.chain]]), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await transport.close()


if __name__ == "__main__":
    asyncio.run(_serve_alone(sys.argv[1]))
