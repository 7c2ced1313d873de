"""The connections to other peers: dialled when needed, shared by streams, replaced when certificates change.

Used by the gRPC transport only. A peer has two, one for control and one for bulk. Dialling ends with a
call of `hello`, which tells why an address fails and whether the other side accepts this peer's certificates.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from shoal.protocol.admission import Membership
from shoal.protocol.dialling import first_answer, is_address
from shoal.protocol.errors import NetworkError, PeerUnreachable
from shoal.protocol.framing import last_words
from shoal.protocol.grpc_settings import CHANNEL_OPTIONS, PREFIX, channel_credentials, grpc
from shoal.protocol.identity import Contact, PeerId, VerifiedPeer
from shoal.protocol.limits import CONNECT_S, CONNECTIONS
from shoal.protocol.progress import Pulse
from shoal.protocol.transport import Channel

HELLO = "hello"
Options = tuple[tuple[str, str | int], ...]
_Key = tuple[PeerId, Channel]


@dataclass(eq=False, slots=True)
class Connection:
    """An open connection to a peer."""

    verified: VerifiedPeer
    chains: tuple[tuple[bytes, ...], tuple[bytes, ...]]  # theirs and ours, as the handshake showed them
    channel: grpc.aio.Channel
    pulse: Pulse = field(default_factory=Pulse)
    streams: int = 0
    gone: bool = False  # broken, or replaced: takes no new streams

    def fits(self, chains: tuple[tuple[bytes, ...], tuple[bytes, ...]]) -> bool:
        """Whether a new stream may use it."""
        ready = self.channel.get_state() is grpc.ChannelConnectivity.READY
        return not self.gone and ready and self.chains == chains

    def lost(self) -> None:
        """A stream found it dead."""
        self.gone = True


class Connections:
    """All outgoing connections of a transport."""

    def __init__(self, membership: Membership, contact_of: Callable[[PeerId], Contact | None]) -> None:
        self._membership = membership
        self._contact_of = contact_of
        self._open: OrderedDict[_Key, Connection] = OrderedDict()
        self._dialling: dict[_Key, asyncio.Task[Connection]] = {}
        self._closing: dict[asyncio.Task[None], None] = {}

    async def get(self, peer: PeerId, channel: Channel) -> Connection:
        """A connection that counts one more stream; `release` takes it back.

        Raises PeerUnreachable with the reason of every address, and AccessErrors: ours about the
        contact's certificates, or the peer's about this one's.
        """
        contact = self._contact_of(peer)
        if contact is None:
            raise PeerUnreachable(
                f"no address of {peer} is known; it may have left, or its record is on its way"
            )
        key = (peer, channel)
        connection = self._open.get(key)
        if connection is None or not connection.fits((contact.chain, self._membership.chain)):
            connection = await self._dialled(key, contact)
        if key in self._open:
            self._open.move_to_end(key)
        connection.streams += 1
        return connection

    def release(self, connection: Connection) -> None:
        """A stream is through."""
        connection.streams -= 1
        if connection.gone and not connection.streams:
            self._close(connection)

    async def forget(self, peer: PeerId) -> None:
        """Close the connections to a peer. Their streams were broken off before."""
        for channel in Channel:
            dialling = self._dialling.get((peer, channel))
            if dialling is not None:
                dialling.cancel()
            connection = self._open.pop((peer, channel), None)
            if connection is not None:
                connection.gone = True
                await connection.channel.close()

    async def close(self) -> None:
        """Close all."""
        for peer, _ in list(self._open) + list(self._dialling):
            await self.forget(peer)
        if self._closing:
            await asyncio.wait(list(self._closing))

    async def _dialled(self, key: _Key, contact: Contact) -> Connection:
        """Dial, or wait for the dial that is under way."""
        task = self._dialling.get(key)
        if task is None:
            task = asyncio.create_task(self._dial(key, contact), name=f"dial {contact.peer}")
            self._dialling[key] = task
            task.add_done_callback(partial(self._dial_done, key))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise PeerUnreachable(f"{contact.peer} was disconnected while it was dialled") from None
            raise

    def _dial_done(self, key: _Key, task: asyncio.Task[Connection]) -> None:
        del self._dialling[key]
        if not task.cancelled():
            task.exception()  # seen, even if everybody who waited has gone

    async def _dial(self, key: _Key, contact: Contact) -> Connection:
        pin = self._membership.verify_leaf_for_dial(contact)
        chains = (contact.chain, self._membership.chain)
        credentials = channel_credentials(self._membership, pin)
        options: Options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", pin.dns_name))
        reasons: dict[str, str] = {}
        attempt = partial(_attempt, credentials, options)
        try:
            async with asyncio.timeout(CONNECT_S):
                channel = await first_answer(contact.addresses, attempt, _discard, reasons)
        except TimeoutError:
            channel = None
        if channel is None:
            told = [f"{a}: {reasons.get(a, f'no answer within {CONNECT_S:g} s')}" for a in contact.addresses]
            raise PeerUnreachable(
                f"{contact.peer} cannot be dialled: {'; '.join(told) or 'no address is known'}"
            )
        self._keep(key, connection := Connection(pin.verified, chains, channel))
        return connection

    def _keep(self, key: _Key, connection: Connection) -> None:
        previous = self._open.pop(key, None)
        self._open[key] = connection
        idle = [k for k, c in self._open.items() if not c.streams and c is not connection]
        for superfluous in idle[: max(0, len(self._open) - CONNECTIONS)]:
            self._retire(self._open.pop(superfluous))
        if previous is not None:
            self._retire(previous)

    def _retire(self, connection: Connection) -> None:
        connection.gone = True
        if not connection.streams:
            self._close(connection)

    def _close(self, connection: Connection) -> None:
        task = asyncio.create_task(connection.channel.close(), name="close a connection")
        self._closing[task] = None
        task.add_done_callback(self._closing.pop)


async def _attempt(credentials: grpc.ChannelCredentials, options: Options, address: str) -> grpc.aio.Channel:
    """A channel to one address that has answered `hello`. Raises NetworkError or the peer's refusal."""
    if not is_address(address):
        raise NetworkError("is not host:port")
    channel = grpc.aio.secure_channel(f"dns:///{address}", credentials, options)
    try:
        hello: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(PREFIX + HELLO)
        refusal = await hello(b"", timeout=CONNECT_S)
        error = last_words(refusal)
        if error is not None:
            raise error
    except grpc.aio.AioRpcError as error:
        await channel.close()
        raise NetworkError(_explained(error.details() or error.code().name)) from None
    except BaseException:
        await channel.close()
        raise
    return channel


async def _discard(channel: grpc.aio.Channel) -> None:
    await channel.close()


def _explained(details: str) -> str:
    """gRPC's words for a failed connection, led by what they mean here."""
    if "CERTIFICATE_VERIFY_FAILED" in details or "Hostname Verification" in details:
        return "another certificate than in this peer's record (an impostor, or a record that is out of date)"
    if "Socket closed" in details or "handshake" in details.lower():
        return f"closed during the handshake; it may not accept this peer's certificates ({details[-200:]})"
    return details[-200:]
