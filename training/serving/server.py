"""A server of sessions: one stage, two methods: `session` for clients, and that of `rows` for neighbours.

A session lives as long as its client's stream. While it does, this server computes what comes in and keeps
the next server of the ring supplied, on the route that the client names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch

from shoal.dht.directory import SignedRecord
from shoal.protocol.errors import (
    Busy,
    MessageInvalid,
    NotHere,
    Stale,
    StreamEnded,
    VersionRetired,
)
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Message, Stream, Transport
from shoal.training.lane import Lane
from shoal.training.methods import at_stage
from shoal.training.model.layout import StageLayout
from shoal.training.serving.admission import Held, admit
from shoal.training.serving.cache import cache_bytes
from shoal.training.serving.cached_stage import CachedStage
from shoal.training.serving.engine import Engine
from shoal.training.serving.hosted import HostedSession
from shoal.training.serving.messages import (
    SESSION,
    OpenSession,
    SessionCut,
    SessionDraft,
    SessionOpened,
    SessionPulse,
    SessionRoute,
    SessionShow,
    SessionShown,
    SessionToken,
)
from shoal.training.serving.rows import Rows
from shoal.training.serving.until import until_first
from shoal.training.serving.versions import Versions
from shoal.training.spec import RunSpec

CLIENTS = frozenset({Role.TRAINER, Role.OWNER, Role.INFERENCE})
PULSE_S = 0.5
_REASON_CHARACTERS = 200
_REOPEN_S = 0.2  # until the stream of a client that comes again is seen to be gone


class SessionServer:
    """Serves one stage. `serve` before the transport starts, `run` until cancelled."""

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        layout: StageLayout,
        *,
        transport: Transport,
        lane: Lane,
        versions: Versions,
        device: str = "cpu",
        budget_bytes: int,
        introduced: Callable[[PeerId, SignedRecord], None] | None = None,
    ) -> None:
        """`introduced` is called with the record of a server that a client names."""
        self.sessions: dict[bytes, HostedSession] = {}
        self.refused = self.evicted = 0
        self._left = False
        self._spec, self._stage, self._layout = spec, stage, layout
        self.versions = versions
        self._transport, self._budget_bytes = transport, budget_bytes
        self._dtype: torch.dtype = getattr(torch, spec.model.dtype)
        self.engine = Engine(CachedStage(spec, layout), lane, self.sessions, self._dtype, device)
        self._rows = Rows(spec, stage, layout, transport, self.sessions, self.engine.wake)
        self._introduced = introduced
        versions.retired = self._retire

    def serve(self) -> None:
        """Register with the transport."""
        self._transport.serve(at_stage(self._stage, SESSION), self._session, CLIENTS)
        self._rows.serve()

    async def run(self) -> None:
        """Compute until cancelled; whoever is here then is sent away, and so is who comes later."""
        try:
            await self.engine.run()
        finally:
            self._left = True
            for session in self.sessions.values():
                session.fail(self._gone())

    def status(self) -> dict[str, object]:
        """JSON-able."""
        return {
            "sessions": len(self.sessions),
            "charged_bytes": sum(one.charged_bytes for one in self.sessions.values()),
            "budget_bytes": self._budget_bytes,
            "positions": self.engine.figures.positions,
            "batches": self.engine.figures.batches,
            "step_s": self.engine.figures.step_s,
            "refused": self.refused,
            "evicted": self.evicted,
            "weights_bytes": self.versions.nbytes,
            "versions": [name.hex() for name in self.versions.names],
        }

    # --- the client's stream

    async def _session(self, stream: Stream) -> None:
        message = await stream.receive(OpenSession, max_payload_bytes=4 * self._spec.model.sequence)
        session = self._open(message, stream)
        self.sessions[session.id] = session
        try:
            await stream.send(SessionOpened(session.version.name))
            self.engine.wake()
            sides = [self._follow_routes(session, stream), self._tell(session, stream)]
            if not (session.first and session.last):
                sides += [self._rows.supply(session), self._rows.supply_beside(session)]
            await until_first(*sides)
        finally:
            del self.sessions[session.id]

    def _open(self, message: Message[OpenSession], stream: Stream) -> HostedSession:
        """Raises MessageInvalid for what does not fit the model, Busy, VersionRetired and NotHere."""
        opening, layout = message.header, self._layout
        if self._left:
            raise self._gone()
        if opening.stage != self._stage:
            raise Stale(f"asked for stage {opening.stage}, this peer holds stage {self._stage}")
        if opening.session in self.sessions:
            raise Busy("a session of this name is open here", _REOPEN_S)
        most = self._spec.model.sequence
        if opening.capacity > most:
            raise MessageInvalid(
                f"{opening.capacity} tokens are too many; this model takes {most}, all in all"
            )
        tokens = self._rows.tokens(message.payload) if layout.first or layout.last else []
        if (layout.first or layout.last) and not 1 <= len(tokens) < opening.capacity:
            raise MessageInvalid(f"{len(tokens)} tokens come with a session of {opening.capacity}")
        bias = opening.sampling.bias if opening.sampling is not None else ()
        if any(entry.token >= self._rows.form.vocabulary for entry in bias):
            raise MessageInvalid(f"a bias lies outside the vocabulary of {self._rows.form.vocabulary}")
        version = self.versions.get(opening.version)
        return HostedSession(
            opening,
            stream.remote,
            version,
            self._make_room(opening, stream),
            tokens=tokens,
            first=layout.first,
            last=layout.last,
            width=self._spec.model.width,
            now_s=asyncio.get_running_loop().time(),
        )

    def _make_room(self, opening: OpenSession, stream: Stream) -> int:
        """What the session is charged; evicts idle ones for it. Raises Busy."""
        rows_bytes = (
            2 * 4 * self._spec.model.width * opening.capacity
        )  # fp32, waiting and for the next server
        wanted = rows_bytes + cache_bytes(self._spec, self._layout.layers, opening.capacity, self._dtype)
        verdict = admit(wanted, stream.remote.token_id, self._held(), self._budget_bytes)
        if verdict.refusal:
            self.refused += 1
            raise Busy(verdict.refusal, verdict.retry_after_s)
        for name in verdict.evict:
            self.evicted += 1
            self.sessions[name].fail(Busy("evicted: it was idle and others needed its room"))
        return wanted

    def _held(self) -> list[Held]:
        now_s, step_s = asyncio.get_running_loop().time(), self.engine.figures.step_s
        return [
            Held(
                one.id,
                one.token_id,
                one.charged_bytes,
                now_s - one.active_s,
                (one.capacity - one.received) * step_s if not one.finish else 0.0,
            )
            for one in self.sessions.values()
            if one.failure is None
        ]

    async def _follow_routes(self, session: HostedSession, stream: Stream) -> None:
        """Until the client leaves."""
        while True:
            try:
                said = (await stream.receive(SessionRoute, SessionDraft, SessionShow)).header
            except StreamEnded:
                return
            if isinstance(said, SessionDraft):
                self._guess(session, said)
                continue
            if isinstance(said, SessionShow):
                session.ask(said)
                continue
            route: SessionRoute = said
            if route.stage != (self._stage + 1) % self._spec.stages.count:
                raise MessageInvalid(f"after stage {self._stage} comes not stage {route.stage}")
            if self._introduced is not None:
                for record in route.record:
                    self._introduced(PeerId(route.peer), record)
            session.turn(route)

    def _guess(self, session: HostedSession, draft: SessionDraft) -> None:
        vocabulary = self._rows.form.vocabulary
        if not session.first:
            raise MessageInvalid(f"drafts are for the first stage, this is stage {self._stage}")
        if not draft.tokens or any(token >= vocabulary for token in draft.tokens):
            raise MessageInvalid(f"a draft is empty, or lies outside the vocabulary of {vocabulary}")
        session.guess(draft.start, list(draft.tokens), asyncio.get_running_loop().time())
        self.engine.wake()

    async def _tell(self, session: HostedSession, stream: Stream) -> None:
        """Tokens, cuts, and a pulse, to the client. What it does not read waits in the session's own list."""
        loop = asyncio.get_running_loop()
        pulse_s = loop.time()
        while session.failure is None:
            while session.told < len(session.tokens):
                finish = session.finish if session.told + 1 == len(session.tokens) else ""
                await stream.send(SessionToken(session.told, session.tokens[session.told], finish))
                session.told += 1
            if session.cut is not None:
                (epoch, reason), session.cut = session.cut, None
                await stream.send(SessionCut(epoch, reason[:_REASON_CHARACTERS]))
            if session.asked is not None:
                shown, session.asked = session.shown(session.asked), None
                await stream.send(SessionShown(shown.positions), shown.pack())
            if loop.time() >= pulse_s:
                await stream.send(SessionPulse(session.received, session.computed, session.step_s))
                pulse_s = loop.time() + PULSE_S
            news = session.cut or session.asked or session.failure
            if session.told == len(session.tokens) and news is None:
                await session.news.wait(pulse_s)
        raise session.failure

    def _gone(self) -> NotHere:
        return NotHere(f"this peer has left stage {self._stage}")

    def _retire(self, version: bytes) -> None:
        for session in self.sessions.values():
            if session.version.name == version:
                session.fail(VersionRetired(f"version {version.hex()[:12]} is retired; open a new session"))
