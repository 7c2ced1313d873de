"""A session at one server: what came in, what is cached, and what goes on to the next server.

State only: `rows` moves the bytes, `engine` computes. All positions' outputs stay until the session ends:
they are what a server that takes over the next stage is rebuilt from. Everything here is bounded by the
capacity that admission charged for.

A position may be computed from a token that a draft guessed. The last stage compares it with what it draws,
the first one hears what was drawn: a wrong guess is rewound, and all that follows from it. Rows that come for
a position again take its place if their token is another one, so a rewinding goes round the ring by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.protocol.errors import MessageInvalid, ShoalError, Stale
from shoal.protocol.identity import VerifiedPeer
from shoal.protocol.limits import DRAFT_TOKENS
from shoal.training.outer.change import Change
from shoal.training.serving.ahead import Ahead, alike
from shoal.training.serving.batching import ALONE, Mates
from shoal.training.serving.cache import Cache
from shoal.training.serving.messages import (
    LENGTH,
    STOP,
    OpenSession,
    SamplingOptions,
    SessionRoute,
    SessionShow,
)
from shoal.training.serving.prints import Prints, Shown
from shoal.training.serving.versions import ServingVersion

_SMOOTHING = 0.2


class HostedSession:
    """One session. Who waits for a part of its state is woken by changes of that part alone."""

    def __init__(
        self,
        opening: OpenSession,
        client: VerifiedPeer,
        version: ServingVersion,
        charged_bytes: int,
        *,
        tokens: Sequence[int],
        first: bool,
        last: bool,
        width: int,
        now_s: float,
    ) -> None:
        """`tokens` known so far, at the ends of the chain."""
        self.id, self.token_id, self.version = opening.session, client.token_id, version
        self.capacity, self.charged_bytes = opening.capacity, charged_bytes
        self.sampling = opening.sampling or SamplingOptions()
        self.first, self.last = first, last
        self.tokens = list(tokens) if last else []  # prompt and drawn ones
        self.told = len(self.tokens)  # to the client
        self.finish = ""
        self.cache: Cache | None = None  # made with the first positions, on the lane
        self.inputs: list[int] = []  # tokens of the positions that are here
        self.computed = 0
        self.supplies: list[Ahead] = []  # of which rewinding tells each
        self.step_s = 0.0  # of a few positions: from their coming until they are computed; 0: none yet
        self.came_with = self.left_with = ALONE  # of the batches before this one and here
        self.away_s = 0.0  # from a position's being computed until the next one comes; 0: none has yet
        self.since_s = self.active_s = now_s  # of the oldest position that waits; of the last movement
        self.route: SessionRoute | None = None
        self.beside: SessionRoute | None = None  # of the higher epoch of the two, if there is one
        self.cut: tuple[int, str] | None = None  # epoch and reason, to tell the client
        self.asked: SessionShow | None = None  # and not shown yet
        self.failure: ShoalError | None = None
        self._begun = 0  # positions that were given out to be computed
        self._settled = len(tokens)  # at the first stage: of its inputs so many are no guesses
        self._refusing = False  # what follows from a wrong guess; the server before does not know yet
        # both take memory as they are written
        self._entered = torch.empty(0 if first else opening.capacity, width)
        self._outputs = torch.empty(0 if last else opening.capacity, width)
        self._feeder_epoch = -1
        self.more = Change()  # that the next server can be told
        self.news = Change()  # for the client
        self._turned = Change()
        if first:
            self._enqueue(tokens, None, now_s)

    # --- input

    def attach(self, epoch: int) -> None:
        """The server before begins to supply. Raises Stale if another one did later."""
        if epoch < self._feeder_epoch:
            raise Stale(f"this session is fed by epoch {self._feeder_epoch}, you come with {epoch}")
        if epoch > self._feeder_epoch:
            self._feeder_epoch, self._refusing = epoch, False

    def take(
        self,
        epoch: int,
        start: int,
        tokens: Sequence[int],
        rows: torch.Tensor | None,
        now_s: float,
        mates: Mates = ALONE,
    ) -> None:
        """Positions from `start`, from the server before: their tokens, and behind stage 0 hidden states.

        Raises Stale when another server feeds it now, MessageInvalid for a gap or more than was asked for.
        """
        self.attach(epoch)
        stop = start + len(tokens)
        if stop > self.capacity or (start > self.received and not self._refusing):
            room = f"{self.received} of {self.capacity} positions are here"
            raise MessageInvalid(f"positions {start} to {stop} do not fit: {room}")
        self.came_with = mates
        self._accept(start, tokens, rows, now_s)
        if self.first:
            self._settled = max(self._settled, stop)

    def guess(self, start: int, tokens: Sequence[int], now_s: float) -> None:
        """What the client believes the text to be from `start` on. To the first stage.

        Guesses that begin from another text than this are passed over. Raises MessageInvalid beyond the
        session's end.
        """
        if start + len(tokens) > self.capacity:
            raise MessageInvalid(f"a draft up to {start + len(tokens)} leaves a session of {self.capacity}")
        known = self.inputs[start : self._settled]
        tokens = tokens[: max(self._settled + DRAFT_TOKENS - start, 0)]
        if not self.finish and alike(known, tokens) == min(len(known), len(tokens)):
            self._accept(start, tokens, None, now_s)

    def _accept(self, start: int, tokens: Sequence[int], rows: torch.Tensor | None, now_s: float) -> None:
        """Take rows but for those that are here already, or are computed from a wrong guess."""
        if start > self.received:
            return
        known, stop = self.tokens[start:], len(tokens)
        right = alike(known, tokens)
        self._refusing = right < min(len(known), stop)
        if self._refusing:
            stop = right
        same = alike(self.inputs[start : start + stop], tokens)
        if same < stop:
            self._rewind(start + same)
            self._enqueue(tokens[same:stop], None if rows is None else rows[same:stop], now_s)

    def _enqueue(self, tokens: Sequence[int], rows: torch.Tensor | None, now_s: float) -> None:
        if not self.waiting:
            if self.computed:
                self.away_s = smoothed(self.away_s, now_s - self.active_s, 0.5)
            self.since_s = now_s
        self.active_s = now_s
        if rows is not None:
            self._entered[self.received : self.received + len(rows)] = rows
        self.inputs.extend(tokens)

    def _rewind(self, position: int) -> None:
        """Forget the positions from there on. Their keys and values are written over."""
        if position == self.received:
            return
        del self.inputs[position:]
        self._begun, self.computed = min(self._begun, position), min(self.computed, position)
        for ahead in self.supplies:
            ahead.rewind(position)

    @property
    def received(self) -> int:
        """Positions that are here."""
        return len(self.inputs)

    @property
    def agreed(self) -> list[int]:
        """Tokens of the positions that need not come again: a guess at the first stage has to."""
        return self.inputs[: self._settled] if self.first else self.inputs

    @property
    def waiting(self) -> int:
        """Positions that are here and not computed."""
        return self.received - self.computed if not self.finish else 0

    @property
    def runs(self) -> bool:
        """Rows have come, and more are to come."""
        return self.received > 0 and not self.finish and self.failure is None

    def next_rows(self, count: int) -> torch.Tensor:
        """The first `count` of those that were not given out yet: a copy, for others may take their place."""
        begun, self._begun = self._begun, self._begun + count
        if self.first:
            return torch.tensor(self.inputs[begun : self._begun])
        return self._entered[begun : self._begun].clone()

    # --- output

    def computed_rows(
        self, start: int, count: int, hidden: torch.Tensor | None, drawn: Sequence[int], now_s: float
    ) -> None:
        """Positions from `start` are cached: their hidden states [count, width] or the tokens drawn.

        What was rewound meanwhile is passed over; tokens were drawn from the text alone, and stay.
        """
        count = min(start + count, self._begun) - start
        if count > 0:
            if hidden is not None:
                self._outputs[start : start + count] = hidden[:count]
            self.computed = start + count
        self.since_s = self.active_s = now_s
        known = len(self.tokens)
        for token in drawn:
            self.tokens.append(token)
            self.finish = self.finish_of(len(self.tokens), token)
        guessed = self.inputs[known : len(self.tokens)]
        right = alike(guessed, drawn)
        if right < len(guessed):
            self._rewind(known + right)
            self._refusing = True
        if self.first and self.last and not self.finish and self.received < len(self.tokens):
            unfed = self.tokens[self.received :]
            self._enqueue(unfed, None, now_s)
        self._settled = max(self._settled, len(self.tokens))
        self.more.notify()  # first: the ring waits for it, and the client only reads
        if self.last:
            self.news.notify()

    def finish_of(self, count: int, token: int) -> str:
        """Why the text ends with this token, the `count`-th of the session; empty if it does not."""
        if token in self.sampling.stop:
            return STOP
        return LENGTH if count >= self.capacity else ""

    @property
    def produced(self) -> int:
        """Positions of which the next server can be told."""
        if self.last:
            return len(self.tokens) - (1 if self.finish else 0)
        return self.computed

    @property
    def outgoing(self) -> Sequence[int]:
        """The tokens of these positions."""
        return self.tokens if self.last else self.inputs

    def outputs(self, start: int, stop: int) -> torch.Tensor:
        """Hidden states that the next server takes for these positions."""
        return self._outputs[start:stop]

    def ask(self, asked: SessionShow) -> None:
        """The client wants to see what went through. Raises MessageInvalid for what cannot be."""
        if not asked.positions or max(asked.positions) >= self.capacity:
            raise MessageInvalid(f"{len(asked.positions)} positions are asked for, of {self.capacity}")
        self.asked = asked
        self.news.notify()

    def shown(self, asked: SessionShow) -> Shown:
        """As far as it is computed."""
        at = [position for position in asked.positions if position < self.computed]
        came = None if self.first else Prints.of(self._entered[at], asked.seed)
        went = None if self.last else Prints.of(self._outputs[at], asked.seed)
        return Shown(tuple(at), asked.seed, came, went)

    # --- life

    def fail(self, error: ShoalError) -> None:
        """The client shall be told, and the session end."""
        self.failure = self.failure or error
        self.news.notify()

    def cannot_supply(self, epoch: int, reason: str) -> None:
        """The client shall be told."""
        self.cut = epoch, reason
        self.news.notify()

    async def next_route(self, known: SessionRoute | None) -> SessionRoute:
        """The route that the client names, once it is another one than this."""
        while self.route is None or self.route is known:
            await self._turned.wait()
        return self.route

    async def next_beside(self, known: SessionRoute | None) -> SessionRoute | None:
        """The one that is to be supplied as well, or nobody, once that is another than this."""
        while self.beside is known:
            await self._turned.wait()
        return self.beside

    def turn(self, route: SessionRoute) -> None:
        """The client names a route; one of a lower epoch than before is passed over."""
        newest = self.beside or self.route
        if newest is not None and route.epoch <= newest.epoch:
            return
        if route.beside:
            self.beside = route
        else:
            self.route, self.beside = route, None
        self._turned.notify()


def smoothed(before: float, seconds: float, weight: float = _SMOOTHING) -> float:
    """0: none was measured before."""
    return before + weight * (seconds - before) if before else seconds
