"""Transport: authenticated streams of messages to a peer. The interface; everything that talks uses it.

Two implementations pass the same tests: `grpc_transport` (real sockets, mutual TLS) and `memory_transport`
(links with latency, bandwidth, loss and partitions on a virtual clock). Callers name a peer, never
an address.

A stream carries `Message`s both ways. A message is a small typed header and a raw payload of any size the
receiver admits; the transport cuts payloads into frames with sequence and checksum and gives them
back whole.
Each side finishes with an explicit END; a stream that stops without END raises `StreamBroken`.

A wait may be cancelled at any time (deadlines are the caller's): a cancelled `receive` loses nothing, the
next one goes on where it stopped; a cancelled `send` breaks the stream.
"""

from __future__ import annotations

import asyncio
import enum
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from shoal.protocol.errors import PeerSilent, ShoalError, StreamBroken
from shoal.protocol.identity import PeerId, Role, VerifiedPeer

Buffer = bytes | bytearray | memoryview
H = TypeVar("H")


class Channel(enum.Enum):
    """Control has its own connection, so that bulk never starves it."""

    CONTROL = "control"
    BULK = "bulk"


@dataclass(frozen=True, slots=True)
class Message(Generic[H]):
    """One message: `header` is an instance of a `wire_message` class, `payload` raw bytes."""

    header: H
    payload: memoryview  # of bytes; perhaps read-only, and at any alignment


class Stream(ABC):
    """One bidirectional stream. Not safe for two concurrent sends or two concurrent receives."""

    remote: VerifiedPeer

    @abstractmethod
    async def send(self, header: object, payload: Buffer = b"") -> None:
        """Send one message; returns when the transport has taken it (back-pressure).

        Raises StreamBroken when the other side is gone, PeerSilent when no byte moved for ABORT_AFTER_S.
        The payload must not change until this returns.
        """

    @abstractmethod
    async def receive(self, *kinds: type[Any], max_payload_bytes: int = 0) -> Message[Any]:
        """The next message, whose header is one of `kinds` and whose payload fits.

        Waits without limit between messages (the caller sets deadlines); inside a message, PeerSilent after
        ABORT_AFTER_S without a byte. Raises StreamEnded after a clean END, StreamBroken without one,
        MessageInvalid, MessageTooLarge (before buffering) or FrameInvalid for what breaks the protocol, and
        the error the remote handler raised, as its own class.
        """

    @abstractmethod
    async def end(self) -> None:
        """Say that nothing more will be sent. Idempotent."""


Handler = Callable[[Stream], Awaitable[None]]
Trouble = Callable[[PeerId, ShoalError], None]


@dataclass(frozen=True, slots=True)
class TransportCounters:
    """What a transport has done since it was made."""

    bytes_in: Mapping[str, int]  # of frames, by method, both directions of opening
    bytes_out: Mapping[str, int]
    streams_in: int  # open now, opened by others
    streams_out: int  # open now, opened by this peer
    refusals: Mapping[str, int]  # inbound streams that were not dispatched, by error class


class Transport(ABC):
    """Opens streams to peers and serves methods to them."""

    me: PeerId

    on_trouble: Trouble | None = None
    """Told at once when a peer cannot be dialled, keeps silent where bytes should move (first after
    SUSPECT_AFTER_S, then when the stream is given up), breaks a stream this peer opened, or breaks the
    protocol. Must not block."""

    @abstractmethod
    def serve(
        self, method: str, handler: Handler, roles: frozenset[Role], channel: Channel = Channel.CONTROL
    ) -> None:
        """Answer `method` for peers that hold one of `roles`; call before `start`.

        `channel` is what the answers count as, whatever the caller opened: bulk keeps to the upload limit.

        `handler` runs in a task the transport owns: on return END is sent, a ShoalError is sent as ABORT,
        and when the caller goes away the task is cancelled. Any other exception is logged and sent as
        "internal error", undescribed.
        """

    @abstractmethod
    def withdraw(self, methods: Collection[str]) -> None:
        """Answer these no longer: what served them is gone. Calls under way go on."""

    @property
    @abstractmethod
    def methods(self) -> frozenset[str]:
        """What is served now."""

    @abstractmethod
    def open(
        self, peer: PeerId, method: str, channel: Channel = Channel.CONTROL
    ) -> AbstractAsyncContextManager[Stream]:
        """A stream to `method` of `peer`. Raises PeerUnreachable, AccessError or StreamBroken.

        Leaving the context normally sends END, and the remote handler has LINGER_S to finish; what it still
        sends is discarded. Leaving by an exception cancels the remote handler. A peer may open to itself.
        """

    @abstractmethod
    async def start(self) -> None:
        """Begin to listen."""

    @abstractmethod
    async def close(self) -> None:
        """Stop listening, cancel handlers, close connections."""

    @abstractmethod
    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection with a peer, both ways (revocation, a leaf that changed)."""

    @abstractmethod
    def counters(self) -> TransportCounters:
        """A copy of the figures."""

    def uplink_bytes_per_s(self) -> float | None:
        """What this peer's uplink carries in bulk: measured, at most its upload limit; `uplink` has the rule.

        None: nothing was measured yet, or this transport does not measure.
        """
        return None

    def _tell(self, peer: PeerId, error: ShoalError) -> None:
        if self.on_trouble is not None:
            self.on_trouble(peer, error)

    def _tell_of_caller(self, peer: PeerId, error: ShoalError) -> None:
        if not isinstance(error, StreamBroken):  # a caller may leave as it likes
            self._tell(peer, error)


async def call(
    transport: Transport,
    peer: PeerId,
    method: str,
    request: object,
    reply: type[H],
    *,
    timeout_s: float,
    payload: Buffer = b"",
    max_payload_bytes: int = 0,
    channel: Channel = Channel.CONTROL,
) -> Message[H]:
    """One request, one reply. Raises PeerSilent after `timeout_s`, and what `open` and `receive` raise."""
    try:
        async with asyncio.timeout(timeout_s), transport.open(peer, method, channel) as stream:
            await stream.send(request, payload)
            await stream.end()
            return await stream.receive(reply, max_payload_bytes=max_payload_bytes)
    except TimeoutError:
        raise PeerSilent(f"{peer} did not answer {method} within {timeout_s:g} s") from None
