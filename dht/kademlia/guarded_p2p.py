"""hivemind's P2P with our guards. `daemon` runs one at a time.

Every unary call and answer travels in an `Envelope`, and what is inside passes the `CallGuard` before
hivemind sees it. No message comes near the 4 MiB at which p2pd hangs a caller and hivemind drops all it
knows. Streams are refused: the DHT has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, ClassVar

from google.protobuf.message import DecodeError
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import (
    ControlFailure,
    P2PDaemonError,
    P2PHandlerError,
    read_pbmsg_safe,
    write_pbmsg,
)
from hivemind.proto import dht_pb2, p2pd_pb2
from hivemind.utils.multiaddr import Multiaddr

from shoal.dht.addresses import best_first
from shoal.dht.envelope import BODY_BYTES, Line, answering
from shoal.dht.kademlia.call_guard import CallGuard
from shoal.protocol.errors import AccessError, FrameInvalid, ProtocolViolation, ShoalError, UsageError
from shoal.protocol.identity import PeerId

logger = logging.getLogger(__name__)

P2P_ERRORS = (
    P2PDaemonError,
    P2PHandlerError,
)  # a refusal of our p2pd, and of a remote peer

_REDIAL_AFTER_S = 60.0  # a peer not heard of for this long may have moved
_PEERS_HEARD = 4096


class GuardedP2P(P2P):  # type: ignore[misc]  # hivemind is untyped
    """One run of p2pd. `daemon` makes a subclass for each with the class attributes set."""

    DHT_MODE_MAPPING: ClassVar = {**P2P.DHT_MODE_MAPPING, "off": {}}
    guard: ClassVar[CallGuard]
    born: ClassVar[list[GuardedP2P]]  # `create` loses its process when it is cancelled; this finds it

    def __init__(self) -> None:
        super().__init__()
        self.born.append(self)
        self._heard_s: dict[PeerID, float] = {}

    @classmethod
    async def create(cls, **options: Any) -> GuardedP2P:
        """A running p2pd. The options are those of hivemind's P2P."""
        p2p: GuardedP2P = await super().create(**options)
        control = p2p._client.control
        control._pending_calls, control._cancel_unary_call = _PendingCalls(), _leave_it_to_end
        return p2p

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        kwargs["relayService"] = False  # on by default: a relay for anybody, without saying so
        kwargs["connHi"], kwargs["connLo"] = 4096, 2048  # the default drops to 256 connections at 512
        return list(P2P._make_process_args(*args, **kwargs))

    def fault(self) -> str | None:
        """Why this p2pd is of no use any more, as far as can be told without asking it."""
        control = self._client.control if self._client is not None else None
        if self._child is not None and self._child.returncode is not None:
            return f"p2pd ended with status {self._child.returncode}"
        for task in (control._read_task, control._write_task) if control is not None else ():
            if task.done():
                error = None if task.cancelled() else task.exception()
                return f"the connection to p2pd broke ({error!r})" if error else "p2pd closed the connection"
        return None

    def kill(self) -> None:
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()

    def forget_errors(self) -> None:
        """Of a lost connection; else asyncio complains of them in the log when they are collected."""
        control = self._client.control if self._client is not None else None
        for task in (control._read_task, control._write_task) if control is not None else ():
            if task.done() and not task.cancelled():
                task.exception()

    async def until_fault(self) -> str:
        """Wait until p2pd ends or stops to listen to us; the reason."""
        ended = asyncio.ensure_future(self._child.wait())
        control = self._client.control
        try:
            await asyncio.wait(
                {ended, control._read_task, control._write_task}, return_when="FIRST_COMPLETED"
            )
        finally:
            ended.cancel()
        return self.fault() or "p2pd ended"

    async def identify(self) -> tuple[str, ...]:
        """The routes that p2pd listens on, public ones first. Also the ping: it leaves no socket behind."""
        response = await self._control(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        for task_id, task in list(self._client.control._handler_tasks.items()):
            if task.done():  # hivemind keeps those of cancelled calls for ever
                del self._client.control._handler_tasks[task_id]
        return best_first(tuple(str(Multiaddr(raw)) for raw in response.identify.addrs))

    async def dial(self, peer: PeerID, routes: tuple[str, ...]) -> None:
        """Connect, or stay connected. Raises ControlFailure with libp2p's reasons."""
        target = p2pd_pb2.ConnectRequest(peer=peer.to_bytes(), addrs=list(_encoded(routes)))
        response = await self._control(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=target))
        if response.type == p2pd_pb2.Response.ERROR:
            raise ControlFailure(response.error.msg)

    async def _control(self, request: Any) -> Any:
        """What p2pd answers. Raises OSError, and EOFError where it closes the connection."""
        reader, writer = await self._client.control.daemon_connector.open_connection()
        try:
            await write_pbmsg(writer, request)
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            return response
        except (DecodeError, ValueError) as error:
            raise ConnectionError(f"its answer cannot be read: {error}") from error
        finally:
            writer.close()

    async def add_protobuf_handler(
        self, name: str, handler: Callable[..., Any], input_protobuf_type: type[Any], **options: Any
    ) -> None:
        if options.get("stream_input") or options.get("stream_output"):
            raise UsageError(f"{name} asks for streams, and DHT calls are unary; hivemind has changed")

        async def answer(call: _Raw, context: P2PContext) -> _Raw:
            return await self._answer(
                name, handler, input_protobuf_type, call.data, _peer(context.remote_id), context
            )

        await super().add_protobuf_handler(name, answer, _Raw)

    async def _answer(
        self,
        name: str,
        handler: Callable[..., Awaitable[Any]],
        kind: type[Any],
        call: bytes,
        peer: PeerId,
        context: Any,
    ) -> _Raw:
        guard = self.guard
        line = Line(peer, guard.me, name.encode())
        try:
            header, body = guard.envelope.open(line, call)
            request = _parsed(kind, body)
            guard.check_sender(request.peer, peer)
            allowed = await guard.allows(request)
        except (AccessError, ProtocolViolation) as error:
            guard.calls_refused += 1
            logger.debug("refused %s from %s: %s", name, peer, error)
            raise
        guard.learn(peer, header)
        try:
            response = await handler(request, context) if allowed else _not_stored(request)
        except Exception:  # the edge of hivemind's handler: its text would go to the caller verbatim
            logger.exception("%s failed for %s", name, peer)
            raise ShoalError("internal error; the peer's own log has the cause") from None
        guard.fit(response)
        header = guard.header(response)
        return _Raw(guard.envelope.seal(answering(line, call), header, response.SerializeToString()))

    async def call_protobuf_handler(
        self, peer_id: PeerID, name: str, input: Any, output_protobuf_type: type[Any]
    ) -> Any:
        guard, peer = self.guard, _peer(peer_id)
        body = input.SerializeToString()
        if len(body) > BODY_BYTES and isinstance(input, dht_pb2.StoreRequest):
            logger.warning(
                "not handing %d bytes of records on to %s: more than a call takes", len(body), peer
            )
            return _not_stored(input)  # an error would make hivemind forget the peer
        line = Line(guard.me, peer, name.encode())
        call = guard.envelope.seal(line, guard.header(input), body)
        try:
            await self._reach(peer_id, peer)
            answer = await super().call_protobuf_handler(peer_id, name, _Raw(call), _Raw)
            header, body = guard.envelope.open(answering(line, call), answer.data)
            response = _parsed(output_protobuf_type, body)
            guard.check_sender(response.peer, peer)
        except BaseException:
            self._heard_s.pop(peer_id, None)
            raise
        if len(self._heard_s) > _PEERS_HEARD:
            self._heard_s.clear()
        self._heard_s[peer_id] = asyncio.get_running_loop().time()
        guard.learn(peer, header)
        await guard.clean(response)
        return response

    async def _reach(self, peer_id: PeerID, peer: PeerId) -> None:
        """Dial by the address book unless the peer answered lately."""
        heard_s = self._heard_s.get(peer_id)
        routes = self.guard.book.routes(peer)
        if routes and (heard_s is None or asyncio.get_running_loop().time() - heard_s > _REDIAL_AFTER_S):
            await self.dial(peer_id, routes)


class _PendingCalls(dict[Any, "asyncio.Future[bytes]"]):
    """Calls that still wait for their answer.

    hivemind's reader gives the answer to any call it finds here, and dies if that one was cancelled a moment
    before; then no call of this process is ever answered again.
    """

    def __contains__(self, call_id: object) -> bool:
        future = self.get(call_id)
        return future is not None and not future.done()


async def _leave_it_to_end(call_id: object) -> None:
    """p2pd is not told of a cancelled call: its answer finds nobody waiting (`_PendingCalls`) and is dropped.

    One that is told just as the call's stream opens answers with a nil message and panics: `exchangeMessages`
    closes its channel before `doUnaryCall` looks (persistent_stream.go). It took 4,600 cancelled calls.
    """


class _Raw:
    """Bytes that hivemind takes for a protobuf message."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def SerializeToString(self) -> bytes:  # noqa: N802  (protobuf's name)
        return self.data

    @classmethod
    def FromString(cls, data: bytes | None) -> _Raw:  # noqa: N802
        """None is what hivemind makes of p2pd's word for an empty answer."""
        return cls(data or b"")


def _peer(peer_id: PeerID) -> PeerId:
    return PeerId(peer_id.to_base58())


def _encoded(routes: tuple[str, ...]) -> Iterator[bytes]:
    """Those that libp2p understands: others say of a peer what they like."""
    for route in routes:
        with contextlib.suppress(ValueError):
            yield Multiaddr(route).to_bytes()


def _parsed(kind: type[Any], body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise FrameInvalid(f"not a {kind.__name__} ({len(body)} bytes)") from error


def _not_stored(request: Any) -> Any:
    return dht_pb2.StoreResponse(store_ok=[False] * len(request.keys))
