"""The transport on real sockets: gRPC with mutual TLS. Made by the daemon; the interface is `transport`.

Every connection shows both peers' certificates. The dialler pins exactly the leaf of the peer it wants; the
server verifies chain, role and binding of the caller's leaf on every stream, before anything is dispatched.
Messages are framed as everywhere; one gRPC message carries one frame.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from shoal.protocol.admission import Membership
from shoal.protocol.certificates import chain_of_pem
from shoal.protocol.contacts import ContactBook
from shoal.protocol.errors import PeerUnreachable, ShoalError, TransportLost
from shoal.protocol.framed_stream import FramedStream
from shoal.protocol.framing import FrameEncoder
from shoal.protocol.grpc_connections import HELLO, Connections
from shoal.protocol.grpc_pipes import ClientPipe, ServerPipe
from shoal.protocol.grpc_settings import (
    PREFIX,
    SERVER_OPTIONS,
    grpc,
    server_configuration,
    server_credentials,
)
from shoal.protocol.identity import Contact, PeerId, Role, VerifiedPeer
from shoal.protocol.limits import ABORT_AFTER_S, STREAMS_IN_ALL
from shoal.protocol.progress import Pulse
from shoal.protocol.service import Service
from shoal.protocol.session import Sessions
from shoal.protocol.transport import Channel, Handler, Stream, Transport, TransportCounters
from shoal.protocol.uplink import Uplink

_ANY_HOST = frozenset({"", "0.0.0.0", "::"})
_Context = grpc.aio.ServicerContext[bytes, bytes]


class GrpcTransport(Transport):
    """One peer's transport. `port` is what it listens on once started (0: not yet)."""

    def __init__(
        self,
        membership: Membership,
        contacts: ContactBook,
        host: str = "0.0.0.0",
        port: int = 0,
        upload_bytes_per_s: float | None = None,
    ) -> None:
        self.me = membership.me.peer
        self.port = port
        self._membership = membership
        self._contacts = contacts
        self._host = host
        self._uplink = Uplink(upload_bytes_per_s)
        self._service = Service()
        self._sessions = Sessions()
        self._connections = Connections(membership, self._contact_of)
        self._pipes: dict[ClientPipe | ServerPipe, PeerId] = {}
        self._pulses: WeakValueDictionary[str, Pulse] = WeakValueDictionary()  # of callers, by address
        self._server: grpc.aio.Server | None = None
        self._renewed: grpc.ServerCertificateConfiguration | None = None

    def serve(
        self, method: str, handler: Handler, roles: frozenset[Role], channel: Channel = Channel.CONTROL
    ) -> None:
        self._service.register(method, handler, roles, channel)

    def withdraw(self, methods: Collection[str]) -> None:
        self._service.withdraw(methods)

    @property
    def methods(self) -> frozenset[str]:
        return self._service.methods

    def open(
        self, peer: PeerId, method: str, channel: Channel = Channel.CONTROL
    ) -> AbstractAsyncContextManager[Stream]:
        return self._open(peer, method, channel)

    async def start(self) -> None:
        """Begin to listen. Raises TransportLost when the port cannot be had."""
        server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=2 * STREAMS_IN_ALL)
        server.add_generic_rpc_handlers((_Dispatch(self),))
        address = f"[{self._host}]:{self.port}" if ":" in self._host else f"{self._host}:{self.port}"
        try:
            self.port = server.add_secure_port(
                address, server_credentials(self._membership, self._take_renewed)
            )
        except RuntimeError as error:
            await server.stop(None)
            raise TransportLost(f"cannot listen on {address}: {error}; is the port in use?") from error
        await server.start()
        self._server = server
        self._membership.renewed.append(self._renew)

    async def close(self) -> None:
        if self._renew in self._membership.renewed:
            self._membership.renewed.remove(self._renew)
        for pipe in list(self._pipes):
            pipe.break_off()
        await self._service.cancel()
        await self._sessions.close()
        await self._connections.close()
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def disconnect(self, peer: PeerId) -> None:
        for pipe, remote in list(self._pipes.items()):
            if remote == peer:
                pipe.break_off()
        await self._service.cancel(peer)
        await self._connections.forget(peer)

    def counters(self) -> TransportCounters:
        return self._service.counters(self._sessions.count)

    def uplink_bytes_per_s(self) -> float | None:
        return self._uplink.bytes_per_s()

    @asynccontextmanager
    async def _open(self, peer: PeerId, method: str, channel: Channel) -> AsyncIterator[Stream]:
        try:
            connection = await self._connections.get(peer, channel)
        except PeerUnreachable as error:
            self._tell(peer, error)
            raise
        call: grpc.aio.StreamStreamCall[bytes, bytes]
        call = connection.channel.stream_stream(PREFIX + method)()
        pipe = ClientPipe(f"{method} to {peer}", call, connection.lost)
        traffic = self._service.traffic(method, opened_here=True)
        outlet = self._uplink.outlet(channel, to_itself=peer == self.me)
        trouble = partial(self._tell, peer)
        stream = FramedStream(
            connection.verified, pipe, traffic, connection.pulse, outlet, trouble, opened_here=True
        )
        self._pipes[pipe] = peer

        def closed() -> None:
            del self._pipes[pipe]
            self._connections.release(connection)

        async with self._sessions.run(stream, closed):
            yield stream

    async def answer(self, method: str, _: object, context: _Context) -> None:
        """Serve one stream; called by gRPC in a task of its own, cancelled when the caller went away."""
        try:
            caller = self._verified(context)
        except ShoalError as refusal:
            self._service.refused(refusal)
            await context.write(FrameEncoder().abort(refusal))
            return
        # Else the first frame brings it along, and `abort` amid that sends it again, which fails.
        await context.send_initial_metadata(())
        pulse = self._pulses.setdefault(context.peer(), Pulse())
        pipe = ServerPipe(f"{method} from {caller.peer}", context)
        trouble = partial(self._tell_of_caller, caller.peer)
        outlet = self._uplink.outlet(self._service.channel(method), to_itself=caller.peer == self.me)
        stream = FramedStream(caller, pipe, self._service.traffic(method), pulse, outlet, trouble)
        self._pipes[pipe] = caller.peer
        try:
            await self._service.answer(method, stream)
            await pipe.drain(ABORT_AFTER_S)
            broken = pipe.broken
        finally:
            del self._pipes[pipe]
            await stream.release()
        if broken:  # waits behind a frame that the caller does not take; gRPC owns this task
            await context.abort(grpc.StatusCode.CANCELLED, "broken off")

    async def hello(self, _: bytes, context: Any) -> bytes:
        """The end of a handshake: empty, or an ABORT frame that says why this caller is refused."""
        try:
            self._verified(context)
        except ShoalError as refusal:
            self._service.refused(refusal)
            return FrameEncoder().abort(refusal)
        return b""

    def _verified(self, context: Any) -> VerifiedPeer:
        """Who calls, by the certificates of the connection. Raises AccessError."""
        shown = context.auth_context()
        chain = chain_of_pem(*shown.get("x509_pem_cert", ()), *shown.get("x509_pem_cert_chain", ()))
        return self._membership.verify(chain)

    def _contact_of(self, peer: PeerId) -> Contact | None:
        if peer != self.me:
            return self._contacts.get(peer)
        host = "127.0.0.1" if self._host in _ANY_HOST else self._host
        address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        return Contact(self.me, (address,), self._membership.chain)

    def _renew(self) -> None:
        self._renewed = server_configuration(self._membership)

    def _take_renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC on a thread of its own; one reference is swapped, nothing else is touched."""
        renewed, self._renewed = self._renewed, None
        return renewed


class _Dispatch(grpc.GenericRpcHandler):
    """Gives every stream under our prefix to the transport; unknown methods are refused there, in words."""

    def __init__(self, transport: GrpcTransport) -> None:
        self._transport = transport

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if not details.method.startswith(PREFIX):
            return None
        method = details.method.removeprefix(PREFIX)
        if method == HELLO:
            return grpc.unary_unary_rpc_method_handler(self._transport.hello)
        return grpc.stream_stream_rpc_method_handler(partial(self._transport.answer, method))
