"""Continuous batching: computes what sessions wait for, batch by batch, on the compute lane.

One task runs it. Between two batches sessions may come and go; one that went while its batch was computed
is passed over. At the last stage the drawing of tokens is part of the batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shoal.protocol.errors import ShoalError
from shoal.training.lane import Lane
from shoal.training.serving.batching import (
    STEP_ROWS,
    Away,
    Mates,
    StepCost,
    Waiting,
    mates_until_s,
    next_batch,
    others_until_s,
)
from shoal.training.serving.cached_stage import CachedStage, Span
from shoal.training.serving.hosted import HostedSession, smoothed
from shoal.training.serving.sampling import next_token
from shoal.training.serving.versions import ServingVersion
from shoal.training.work import Work

_log = logging.getLogger(__name__)
_WARM_STEPS = 3  # the first ones allocate
_CLAIM_S = 30.0  # so old a step says nothing of the present


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A session's part of a batch."""

    session: HostedSession
    rows: torch.Tensor
    start: int
    tokens: Sequence[int]  # of its positions


@dataclass(slots=True)
class EngineFigures:
    """Since the start."""

    batches: int = 0
    positions: int = 0
    step_s: float = 0.0  # smoothed, of a batch
    text_step_s: float = 0.0  # smoothed, of a few positions: from their coming until they are computed


class Engine:
    """Computes for the sessions in `sessions`, a mapping that the server changes."""

    def __init__(
        self,
        stage: CachedStage,
        lane: Lane,
        sessions: Mapping[bytes, HostedSession],
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.figures = EngineFigures()
        self._stage, self._lane, self._sessions = stage, lane, sessions
        self._dtype, self._device = dtype, device
        self._wake = asyncio.Event()
        self._cost = StepCost()
        self._idle_step_s = 0.0  # what a step took with nobody's text
        self._stepped_s = -_CLAIM_S  # when a text's last step was

    def claimed_step_s(self) -> float:
        """What a step takes here, for those who look for a server; 0: not known.

        Of late where there was one: who was busy once must not claim so for ever, for nobody would come.
        """
        recent = asyncio.get_running_loop().time() - self._stepped_s < _CLAIM_S
        return self.figures.text_step_s if recent else self._idle_step_s

    def wake(self) -> None:
        """A session has something to compute."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            while not self._waiting():
                self._wake.clear()
                await self._wake.wait()
            while (held_s := self._held_s()) > 0.0:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(held_s):
                        await self._wake.wait()
            if pieces := self._next():
                await self._run(pieces)

    def _waiting(self) -> list[HostedSession]:
        return [one for one in self._sessions.values() if one.waiting and one.failure is None]

    def _held_s(self) -> float:
        """How much longer the next batch waits for sessions that are on their way; a prompt is not held."""
        waiting = self._waiting()
        if not waiting or any(one.waiting > STEP_ROWS for one in waiting):
            return 0.0
        now_s = asyncio.get_running_loop().time()
        here = [(one.came_with, one.since_s) for one in waiting]
        until_s = mates_until_s(here, self.figures.step_s / 2)
        if self._stage.layout.first:
            version, round_s = waiting[0].version, min(one.away_s for one in waiting)
            away = [
                Away(one.active_s, one.away_s)
                for one in self._sessions.values()
                if one.runs and not one.waiting and one.away_s and one.version is version
            ]
            until_s = max(until_s, others_until_s(now_s, len(waiting), away, round_s, self._cost.cheap_rows))
        return until_s - now_s

    def _next(self) -> list[_Piece]:
        sessions = self._waiting()
        waiting = [Waiting(i, one.version.name, one.waiting, one.since_s) for i, one in enumerate(sessions)]
        return [_piece(sessions[key], rows) for key, rows in next_batch(waiting)]

    async def _run(self, pieces: list[_Piece]) -> None:
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        try:
            outcome = await self._lane.run(Work.SERVE, self._compute, pieces)
        except Exception as error:  # the edge of this task: training and the other sessions go on
            if len(pieces) > 1:  # each alone, to find whose fault it is; caches take the same rows again
                for piece in pieces:
                    await self._run([piece])
                return
            _log.exception("a session's positions could not be computed")
            told = ShoalError("computing the session's positions failed")
            pieces[0].session.fail(error if isinstance(error, ShoalError) else told)
            return
        now_s = loop.time()
        self.figures.batches += 1
        self.figures.step_s = smoothed(self.figures.step_s, now_s - begun_s)
        self._cost.add(sum(len(piece.rows) for piece in pieces), now_s - begun_s)
        for piece, (hidden, drawn) in zip(pieces, outcome, strict=True):
            self.figures.positions += len(piece.rows)
            if len(piece.rows) <= STEP_ROWS:
                self._note_step(piece.session, now_s - piece.session.since_s)
            piece.session.computed_rows(piece.start, len(piece.rows), hidden, drawn, now_s)
        self._tie(pieces, [hidden is not None or bool(drawn) for hidden, drawn in outcome])

    def _tie(self, pieces: Sequence[_Piece], produced: Sequence[bool]) -> None:
        """What goes on from a batch to the same server shall be computed together there."""
        sessions = [piece.session for piece, there in zip(pieces, produced, strict=True) if there]
        going = [(one, one.route.peer) for one in sessions if one.route is not None and not one.finish]
        count = Counter(peer for _, peer in going)
        for session, peer in going:
            session.left_with = Mates("", self.figures.batches, count[peer])

    def _note_step(self, session: HostedSession, seconds: float) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._stepped_s >= _CLAIM_S:
            self.figures.text_step_s = 0.0
        self._stepped_s = now_s
        session.step_s = smoothed(session.step_s, seconds)
        self.figures.text_step_s = smoothed(self.figures.text_step_s, seconds)

    async def warm(self, version: ServingVersion) -> None:
        """Take a step with nobody's text, so that it is known how long one takes before somebody asks."""
        for _ in range(_WARM_STEPS):
            begun_s = asyncio.get_running_loop().time()
            await self._lane.run(Work.SERVE, self._step, version)
            self._idle_step_s = asyncio.get_running_loop().time() - begun_s

    def _step(self, version: ServingVersion) -> None:
        weights = version.weights(self._dtype, self._device)
        rows = (
            torch.zeros(1, dtype=torch.int64)
            if self._stage.layout.first
            else torch.zeros(1, self._stage.width)
        )
        hidden = self._stage.forward(weights, rows, [Span(self._stage.cache(weights), 0, 1)])
        if self._stage.layout.last:
            self._stage.logits(weights, hidden)

    def _compute(self, pieces: Sequence[_Piece]) -> list[tuple[torch.Tensor | None, list[int]]]:
        """For each piece its hidden states, or the tokens drawn. On the lane."""
        weights = pieces[0].session.version.weights(self._dtype, self._device)
        spans = []
        for piece in pieces:
            cache = piece.session.cache = piece.session.cache or self._stage.cache(weights)
            cache.trim(piece.start)
            spans.append(Span(cache, piece.start, len(piece.rows)))
        hidden = self._stage.forward(weights, torch.cat([piece.rows for piece in pieces]), spans)
        parts = torch.split(hidden, [len(piece.rows) for piece in pieces])
        if not self._stage.layout.last:
            return [(part.float().cpu(), []) for part in parts]
        ends = [part[_known(piece) :] for piece, part in zip(pieces, parts, strict=True)]
        whole = torch.cat(ends)
        scores = self._stage.logits(weights, whole) if len(whole) else whole
        each = zip(pieces, torch.split(scores, [len(end) for end in ends]), strict=True)
        return [(None, _draw(piece, own)) for piece, own in each]


def _piece(session: HostedSession, rows: int) -> _Piece:
    start = session.computed
    return _Piece(session, session.next_rows(rows), start, session.inputs[start : start + rows])


def _known(piece: _Piece) -> int:
    """How many of its positions have a next token that is known."""
    return max(len(piece.session.tokens) - 1 - piece.start, 0)


def _draw(piece: _Piece, scores: torch.Tensor) -> list[int]:
    """The tokens after its other positions, of which these are the logits, up to the first wrong guess."""
    session, drawn = piece.session, list[int]()
    guesses = [*piece.tokens[_known(piece) + 1 :], None]
    for logits, guess in zip(scores, guesses, strict=False):
        before = session.tokens + drawn
        drawn.append(next_token(logits, before, session.sampling))
        if session.finish_of(len(before) + 1, drawn[-1]) or drawn[-1] != guess:
            break
    return drawn
