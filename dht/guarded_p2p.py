"""hivemind's P2P with our guards. Imports hivemind, so only `daemon.load_hivemind` imports this module.

Every unary call and answer travels in an `Envelope`; what is inside is checked before hivemind sees it:
node ids derive from peer ids (hivemind takes any, which makes eclipsing a key free), only records that pass
the `RecordGate` are stored or found, plain values cannot overwrite a bucket, and no message comes near the
4 MiB at which p2pd hangs a caller and hivemind drops all it knows. Streams are refused: the DHT has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

import msgpack  # hivemind's own dependency, and its format for values
from google.protobuf.message import DecodeError
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import (
    ControlFailure,
    P2PDaemonError,
    P2PHandlerError,
    read_pbmsg_safe,
    write_pbmsg,
)
from hivemind.proto import dht_pb2, p2pd_pb2
from hivemind.utils import MSGPackSerializer
from hivemind.utils.multiaddr import Multiaddr

from shoal.dht.addresses import AddressBook
from shoal.dht.envelope import BODY_BYTES, NEIGHBOURS, CallHeader, Envelope, Line, Neighbour, answering
from shoal.dht.gate import RecordGate
from shoal.protocol import limits
from shoal.protocol.errors import (
    AccessError,
    FrameInvalid,
    ProtocolViolation,
    RecordInvalid,
    ShoalError,
)
from shoal.protocol.identity import PeerId

logger = logging.getLogger(__name__)

P2P_ERRORS = (
    P2PDaemonError,
    P2PHandlerError,
)  # what hivemind raises for a daemon's and a remote peer's refusals

_KEY_BYTES = 20
_KEYS_PER_CALL = 64
_PLAIN_VALUE, _WHOLE_DICTIONARY = MSGPackSerializer.dumps(None), b""  # hivemind's reserved subkeys
_DICTIONARY_CODE = 0x50  # hivemind's msgpack extension type of a dictionary
_VALUES_PER_SLICE = 16  # verified between two looks at the loop: about 10 ms
_REDIAL_AFTER_S = 60.0  # a peer not heard of for this long may have moved


class CallGuard:
    """The rules for DHT calls of one peer; outlives restarts of p2pd."""

    def __init__(
        self,
        me: PeerId,
        run_id: bytes,
        envelope: Envelope,
        book: AddressBook,
        gate: RecordGate,
        keys: tuple[bytes, ...],
    ) -> None:
        self.me = me
        self.envelope = envelope
        self.book = book
        self.my_routes: tuple[str, ...] = ()
        self.calls_refused = 0
        self._run_id = run_id
        self._gate = gate
        self._bucket_keys = frozenset(hashlib.sha1(key).digest() for key in keys)  # as DHTID.generate does

    def node_id(self, peer: PeerId) -> bytes:
        """The only place in the DHT that a peer may take."""
        return hashlib.blake2b(self._run_id + peer.encode(), digest_size=_KEY_BYTES).digest()

    def check_sender(self, info: Any, peer: PeerId) -> None:
        if info.node_id not in (b"", self.node_id(peer)):
            raise FrameInvalid(f"{peer} claims a node id that is not its own")

    async def allows(self, request: Any) -> bool:
        """Check a request in place; False for a store to be answered with "not stored"."""
        if isinstance(request, dht_pb2.FindRequest):
            _check_keys(request.keys)
        if not isinstance(request, dht_pb2.StoreRequest):
            return True
        _check_keys(request.keys)
        columns = (request.subkeys, request.values, request.expiration_time, request.in_cache)
        if any(len(column) != len(request.keys) for column in columns):
            raise FrameInvalid("a store request with columns of different lengths")
        if any(request.in_cache) or any(key not in self._bucket_keys for key in request.keys):
            return False
        for index, tag in enumerate(request.subkeys):
            if tag == _WHOLE_DICTIONARY:
                request.values[index] = _packed(await self._believed(request.values[index]))
            elif not self._believes(
                _text(tag), _content(request.values[index]), request.expiration_time[index]
            ):
                return False
        return True

    async def clean(self, response: Any) -> None:
        """Remove from a find response what is not to be believed."""
        if not isinstance(response, dht_pb2.FindResponse):
            return
        for result in response.results:
            kept = [
                (node, peer)
                for node, peer in zip(result.nearest_node_ids, result.nearest_peer_ids, strict=False)
                if node == self.node_id(_peer(PeerID(peer)))
            ][:NEIGHBOURS]
            del result.nearest_node_ids[:], result.nearest_peer_ids[:]
            result.nearest_node_ids.extend(node for node, _ in kept)
            result.nearest_peer_ids.extend(peer for _, peer in kept)
            found = result.type == dht_pb2.FOUND_DICTIONARY
            dictionary = await self._believed(result.value) if found else DictionaryDHTValue()
            if dictionary:
                result.value, result.expiration_time = _packed(dictionary), dictionary.latest_expiration_time
            else:
                result.type, result.value, result.expiration_time = dht_pb2.NOT_FOUND, b"", 0.0

    def header(self, message: Any) -> CallHeader:
        """Our routes; with a find response, those of the peers that it names."""
        nearest: dict[PeerId, tuple[str, ...]] = {}
        if isinstance(message, dht_pb2.FindResponse):
            for result in message.results:
                for raw in result.nearest_peer_ids:
                    peer = _peer(PeerID(raw))
                    nearest[peer] = self.book.routes(peer)[:4]
        told = [Neighbour(peer, routes) for peer, routes in nearest.items() if routes]
        return CallHeader(self.my_routes, tuple(told[:NEIGHBOURS]))

    def learn(self, peer: PeerId, header: CallHeader) -> None:
        self.book.learn(peer, header.multiaddrs, by_itself=True)
        for neighbour in header.neighbours:
            if neighbour.peer != self.me:
                self.book.learn(neighbour.peer, neighbour.multiaddrs, by_itself=False)

    async def _believed(self, packed: bytes) -> DictionaryDHTValue:
        """The entries of a dictionary that pass the gate; without its claims of size and expiry."""
        kept = DictionaryDHTValue()
        unseen = 0
        for peer, content, expires_unix_s in _entries(packed):
            unseen += not self._gate.knows(peer, content)
            if self._believes(peer, content, expires_unix_s):
                kept.store(peer, MSGPackSerializer.dumps(content), expires_unix_s)
            if unseen >= _VALUES_PER_SLICE:
                unseen = 0
                await asyncio.sleep(0)
        return kept

    def _believes(self, peer: str, content: bytes, expires_unix_s: float) -> bool:
        try:
            self._gate.open(peer, content, expires_unix_s)
        except (RecordInvalid, AccessError) as error:
            logger.debug("left out of the directory: %s", error)
            return False
        return True


class GuardedP2P(P2P):  # type: ignore[misc]  # hivemind is untyped
    """One run of p2pd. `daemon` makes a subclass for each with the class attributes set."""

    DHT_MODE_MAPPING: ClassVar = {**P2P.DHT_MODE_MAPPING, "off": {}}
    guard: ClassVar[CallGuard]
    born: ClassVar[list[GuardedP2P]]  # `create` loses its process when it is cancelled; this finds it

    def __init__(self) -> None:
        super().__init__()
        self.born.append(self)
        self._heard_s: dict[PeerID, float] = {}

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
        if control is None or control._read_task.done() or control._write_task.done():
            return "the connection to p2pd broke"
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
        """The routes that p2pd listens on; also the ping. Closes its socket even when cancelled."""
        response = await self._control(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        for task_id, task in list(self._client.control._handler_tasks.items()):
            if task.done():  # hivemind keeps those of cancelled calls for ever
                del self._client.control._handler_tasks[task_id]
        return tuple(str(Multiaddr(raw)) for raw in response.identify.addrs)

    async def dial(self, peer: PeerID, routes: tuple[str, ...]) -> None:
        """Connect, or stay connected. Raises ControlFailure with libp2p's reasons."""
        target = p2pd_pb2.ConnectRequest(
            peer=peer.to_bytes(), addrs=[Multiaddr(route).to_bytes() for route in routes]
        )
        response = await self._control(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=target))
        if response.type == p2pd_pb2.Response.ERROR:
            raise ControlFailure(response.error.msg)

    async def _control(self, request: Any) -> Any:
        reader, writer = await self._client.control.daemon_connector.open_connection()
        try:
            await write_pbmsg(writer, request)
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
            return response
        finally:
            writer.close()

    async def add_protobuf_handler(
        self, name: str, handler: Callable[..., Any], input_protobuf_type: type[Any], **options: Any
    ) -> None:
        if options.get("stream_input") or options.get("stream_output"):
            raise NotImplementedError(f"{name}: DHT calls are unary")

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
        return _Raw(
            guard.envelope.seal(answering(line, call), guard.header(response), response.SerializeToString())
        )

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


class _Raw:
    """Bytes that hivemind takes for a protobuf message."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def SerializeToString(self) -> bytes:  # noqa: N802  (protobuf's name)
        return self.data

    @classmethod
    def FromString(cls, data: bytes) -> _Raw:  # noqa: N802
        return cls(data)


def _peer(peer_id: PeerID) -> PeerId:
    return PeerId(peer_id.to_base58())


def _parsed(kind: type[Any], body: bytes) -> Any:
    try:
        return kind.FromString(body)
    except DecodeError as error:
        raise FrameInvalid(f"not a {kind.__name__} ({len(body)} bytes)") from error


def _not_stored(request: Any) -> Any:
    return dht_pb2.StoreResponse(store_ok=[False] * len(request.keys))


def _check_keys(keys: Any) -> None:
    if len(keys) > _KEYS_PER_CALL or any(len(key) != _KEY_BYTES for key in keys):
        raise FrameInvalid(f"a DHT call with {len(keys)} keys, or keys that are not {_KEY_BYTES} bytes")


def _packed(dictionary: DictionaryDHTValue) -> bytes:
    return bytes(MSGPackSerializer.dumps(dictionary))


def _unpacked(data: bytes) -> Any:
    """msgpack without hivemind's extensions, whose decoders recurse on what the sender chooses."""
    try:
        return msgpack.loads(data, raw=False, use_list=True, strict_map_key=True)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise FrameInvalid(f"not msgpack ({len(data)} bytes)") from error


def _text(tag: bytes) -> str:
    subkey = _unpacked(tag) if tag != _PLAIN_VALUE else None
    if not isinstance(subkey, str):
        raise FrameInvalid("a value that is not filed under a peer id")
    return subkey


def _content(value: bytes) -> bytes:
    content = _unpacked(value)
    if not isinstance(content, bytes):
        raise FrameInvalid("a value that is not bytes")
    return content


def _entries(packed: bytes) -> list[tuple[str, bytes, float]]:
    """(peer, content, expiry) of each entry of a packed dictionary. Raises FrameInvalid."""
    outer = _unpacked(packed)
    fields = (
        _unpacked(outer.data)
        if isinstance(outer, msgpack.ExtType) and outer.code == _DICTIONARY_CODE
        else None
    )
    if not isinstance(fields, list) or len(fields) != 3 or not isinstance(fields[2], list):
        raise FrameInvalid("not a dictionary of records")
    entries = []
    for item in fields[2][: limits.RECORDS_HELD]:
        match item:
            case [str() as peer, bytes() as value, float() as expires_unix_s]:
                entries.append((peer, _content(value), expires_unix_s))
            case _:
                raise FrameInvalid("a dictionary entry that is not a record")
    return entries
