"""The serving side of a transport: which methods there are, who may call them, how a call ends.

Shared by both transports: they verify who calls and hand over a stream, `Service` does the rest. Roles
and caps are checked before the handler runs; a refusal is sent as ABORT and changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Iterable

from shoal.protocol.errors import Busy, NotServed, ShoalError, StreamBroken, UsageError, WrongRole
from shoal.protocol.framed_stream import FramedStream, Traffic
from shoal.protocol.identity import PeerId, Role, VerifiedPeer
from shoal.protocol.limits import STREAMS_IN_ALL, STREAMS_PER_PEER, STREAMS_PER_TOKEN
from shoal.protocol.transport import Channel, Handler, TransportCounters

_log = logging.getLogger(__name__)
_UNKNOWN = "(unknown)"  # traffic of methods that nobody serves or opens here: their names are a stranger's


class Service:
    """The methods a transport serves, the calls that run, and their figures."""

    def __init__(self) -> None:
        self._methods: dict[str, tuple[Handler, frozenset[Role], Channel]] = {}
        self._running: dict[_Call, None] = {}
        self._peers: Counter[PeerId] = Counter()
        self._tokens: Counter[str] = Counter()
        self._traffic: dict[str, Traffic] = {}
        self._refusals: Counter[str] = Counter()

    def register(
        self, method: str, handler: Handler, roles: frozenset[Role], channel: Channel = Channel.CONTROL
    ) -> None:
        """Answer `method` by `handler`. Raises UsageError for a name that is taken."""
        if method in self._methods:
            raise UsageError(f"method {method!r} is served already")
        self._methods[method] = (handler, roles, channel)

    def channel(self, method: str) -> Channel:
        """What answers of a method count as; refusals of others are control."""
        return self._methods[method][2] if method in self._methods else Channel.CONTROL

    def withdraw(self, methods: Collection[str]) -> None:
        """Answer these no longer."""
        for method in methods:
            self._methods.pop(method, None)

    @property
    def methods(self) -> frozenset[str]:
        """What is served now."""
        return frozenset(self._methods)

    def traffic(self, method: str, opened_here: bool = False) -> Traffic:
        """The byte counters of a method."""
        name = method if opened_here or method in self._methods else _UNKNOWN
        return self._traffic.setdefault(name, Traffic())

    def refused(self, error: ShoalError) -> None:
        """Count an inbound stream that was not dispatched."""
        self._refusals[type(error).__name__] += 1

    async def answer(self, method: str, stream: FramedStream) -> None:
        """Serve one stream to its end: END after the handler, ABORT for its error or a refusal.

        Runs the handler in the caller's task, whose owner cancels it when the other side went away.
        """
        try:
            handler = self._admit(method, stream.remote)
        except ShoalError as refusal:
            self.refused(refusal)
            await stream.abort(refusal)
            return
        call = self._enter(stream.remote)
        try:
            await self._handle(method, handler, stream)
        except asyncio.CancelledError:
            if (call.closed and call.task.uncancel()) or call.task.cancelling():
                raise  # the other side went away
        else:
            return
        finally:
            self._leave(call)
        await stream.abort(StreamBroken("this peer closed the connection"))

    async def cancel(self, peer: PeerId | None = None) -> None:
        """Cancel the handlers that serve `peer` (None: all) and wait for them.

        A handler that calls this itself is spared; its stream is broken, so it ends soon.
        """
        here = asyncio.current_task()
        calls = [c for c in self._running if peer in (None, c.caller.peer) and c.task is not here]
        for call in calls:
            call.close()
        if calls:
            await asyncio.wait([call.over for call in calls])

    def counters(self, streams_out: int) -> TransportCounters:
        """A copy of the figures."""
        return TransportCounters(
            bytes_in={method: traffic.bytes_in for method, traffic in self._traffic.items()},
            bytes_out={method: traffic.bytes_out for method, traffic in self._traffic.items()},
            streams_in=len(self._running),
            streams_out=streams_out,
            refusals=dict(self._refusals),
        )

    def _admit(self, method: str, caller: VerifiedPeer) -> Handler:
        if method not in self._methods:
            raise NotServed(
                f"this peer does not serve {method[:64]!r}; it may have left a stage, or run another version"
            )
        handler, roles, _ = self._methods[method]
        if not roles & caller.roles:
            raise WrongRole(
                f"{method} is for {_names(roles)}; the token of {caller.peer} grants {_names(caller.roles)}"
            )
        counts = (
            (self._peers[caller.peer], STREAMS_PER_PEER, "from this peer"),
            (self._tokens[caller.token_id], STREAMS_PER_TOKEN, "from peers of this token"),
            (len(self._running), STREAMS_IN_ALL, "in all"),
        )
        for count, cap, what in counts:
            if count >= cap:
                raise Busy(f"{count} streams {what} are open, {cap} are allowed")
        return handler

    async def _handle(self, method: str, handler: Handler, stream: FramedStream) -> None:
        try:
            await handler(stream)
            await stream.end()
        except ShoalError as error:
            await stream.abort(error)
        except Exception as error:  # a bug of ours must not take the transport along
            _log.exception("the handler of %s failed for %s", method, stream.remote.peer)
            await stream.abort(error)

    def _enter(self, caller: VerifiedPeer) -> _Call:
        call = _Call(caller)
        self._running[call] = None
        self._peers[caller.peer] += 1
        self._tokens[caller.token_id] += 1
        return call

    def _leave(self, call: _Call) -> None:
        call.over.set_result(None)
        del self._running[call]
        caller = call.caller
        self._peers[caller.peer] -= 1
        self._tokens[caller.token_id] -= 1
        if not self._peers[caller.peer]:
            del self._peers[caller.peer]
        if not self._tokens[caller.token_id]:
            del self._tokens[caller.token_id]


class _Call:
    """A handler that runs, and the task it runs in, which may have more to do when `over` is set."""

    def __init__(self, caller: VerifiedPeer) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("streams are served by tasks only")
        self.caller = caller
        self.task = task
        self.over: asyncio.Future[None] = task.get_loop().create_future()
        self.closed = False  # by this side

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.task.cancel()


def _names(roles: Iterable[Role]) -> str:
    return ", ".join(sorted(roles)) or "nobody"
