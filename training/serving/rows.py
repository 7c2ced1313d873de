"""Rows: positions on their way from one server of a session's ring to the next. Method `session.rows`.

The server that supplies attaches and is told which tokens' positions the other has: one that takes over has
nothing and gets all, another one only what it lacks, or what is other than it should be. Each position comes
with its token, so that both sides know what it was computed from: drafts come and go. `server` owns one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import torch

from shoal.protocol.errors import MessageInvalid, NotHere, ShoalError, StreamEnded
from shoal.protocol.identity import Role
from shoal.protocol.transport import Channel, Stream, Transport
from shoal.training.methods import at_stage
from shoal.training.model.layout import StageLayout
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.serving.ahead import Ahead
from shoal.training.serving.batching import Mates
from shoal.training.serving.hosted import HostedSession
from shoal.training.serving.messages import ROWS, RowsAttach, RowsChunk, RowsHave, SessionRoute
from shoal.training.serving.until import until_first
from shoal.training.spec import RunSpec

SERVERS = frozenset({Role.TRAINER, Role.OWNER})
CHUNK_ROWS = 128  # of one message


class Rows:
    """What one server sends of its sessions, and takes for them."""

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        layout: StageLayout,
        transport: Transport,
        sessions: Mapping[bytes, HostedSession],
        came: Callable[[], None],
    ) -> None:
        """`came` is called when there is something to compute."""
        self.form = PayloadFormat.of_inference(spec)
        self._most_positions = spec.model.sequence
        self._stage, self._layout = stage, layout
        self._transport, self._sessions, self._came = transport, sessions, came
        self._most_bytes = self.form.token_bytes(1, CHUNK_ROWS)
        if not layout.first:
            self._most_bytes += self.form.hidden_bytes(1, self.form.widest, CHUNK_ROWS)

    def serve(self) -> None:
        """Register with the transport."""
        self._transport.serve(at_stage(self._stage, ROWS), self._take, SERVERS)

    # --- supplying the next server

    async def supply(self, session: HostedSession) -> None:
        """Along each route that the client names; a route that fails is told, and the next one awaited."""
        route: SessionRoute | None = None
        while True:
            route = await session.next_route(route)
            try:
                await until_first(self._supply_along(session, route), session.next_route(route))
            except ShoalError as error:
                session.cannot_supply(route.epoch, f"{type(error).__name__}: {error}")

    async def supply_beside(self, session: HostedSession) -> None:
        """Whoever is being built, while the client wishes it; that it fails is told."""
        route: SessionRoute | None = None
        while True:
            route = await session.next_beside(route)
            if route is None:
                continue
            try:
                await until_first(self._supply_along(session, route), session.next_beside(route))
            except ShoalError as error:
                session.cannot_supply(route.epoch, f"{type(error).__name__}: {error}")

    async def _supply_along(self, session: HostedSession, route: SessionRoute) -> None:
        async with self._transport.open(route.peer, at_stage(route.stage, ROWS), Channel.BULK) as stream:
            await stream.send(RowsAttach(session.id, route.epoch, route.stage))
            message = await stream.receive(RowsHave, max_payload_bytes=4 * self._most_positions)
            have: RowsHave = message.header
            there = self.tokens(message.payload) if have.positions else []
            if len(there) != have.positions:
                raise MessageInvalid(f"{len(there)} tokens came where {have.positions} were announced")
            ahead = Ahead(there)
            session.supplies.append(ahead)
            try:
                # nothing more is to come from there: that `receive` ends means that the other side has gone
                await until_first(self._push(session, ahead, stream), stream.receive())
            finally:
                session.supplies.remove(ahead)

    async def _push(self, session: HostedSession, ahead: Ahead, stream: Stream) -> None:
        while True:
            due = ahead.due(session.outgoing, session.produced)
            if not due:
                await session.more.wait()
                continue
            due = due[:CHUNK_ROWS]
            payload = self._pack(session, due)
            ahead.sending(due)  # before the wait: what is rewound meanwhile is due again
            mates = session.left_with
            await stream.send(RowsChunk(due.start, len(due), mates.batch, mates.count), payload)

    # --- being supplied

    async def _take(self, stream: Stream) -> None:
        attach: RowsAttach = (await stream.receive(RowsAttach)).header
        session = self._session_of(attach)
        session.attach(attach.epoch)
        have = session.agreed
        await stream.send(RowsHave(len(have)), self.form.pack_ids(have))
        while True:
            try:
                message = await stream.receive(RowsChunk, max_payload_bytes=self._most_bytes)
            except StreamEnded:
                return
            chunk: RowsChunk = message.header
            session = self._session_of(attach)
            tokens, rows = self._unpack(message.payload, chunk.count)
            mates = Mates(stream.remote.peer, chunk.batch, chunk.sessions)
            session.take(attach.epoch, chunk.start, tokens, rows, asyncio.get_running_loop().time(), mates)
            self._came()

    def _session_of(self, attach: RowsAttach) -> HostedSession:
        session = self._sessions.get(attach.session)
        if session is None or attach.stage != self._stage:
            raise NotHere(f"no such session is open here at stage {attach.stage}")
        return session

    # --- bytes

    def _pack(self, session: HostedSession, due: range) -> bytes:
        ids = self.form.pack_ids(session.outgoing[due.start : due.stop])
        if self._layout.last:
            return ids
        hidden = session.outputs(due.start, due.stop)
        return b"".join((ids, self.form.pack_hidden(hidden, self.form.widest)))

    def _unpack(self, payload: memoryview, count: int) -> tuple[list[int], torch.Tensor | None]:
        """The tokens of `count` positions, and behind stage 0 their hidden states."""
        size = self.form.token_bytes(1, count)
        tokens = self.tokens(payload[:size])
        if len(tokens) != count:
            raise MessageInvalid(f"{len(tokens)} tokens came where {count} were announced")
        if not self._layout.first:
            return tokens, self.form.unpack_hidden(payload[size:], 1, self.form.widest, "cpu", count)[0]
        if payload.nbytes != size:
            raise MessageInvalid(f"{payload.nbytes} bytes came for {count} tokens")
        return tokens, None

    def tokens(self, payload: memoryview) -> list[int]:
        """Raises MessageInvalid for none, and for what no tokens are."""
        if not payload.nbytes or payload.nbytes % 4:
            raise MessageInvalid(f"{payload.nbytes} bytes are no tokens")
        return self.form.unpack_ids(payload)
