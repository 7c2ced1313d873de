"""A session at one server: what came in, what is cached, and what goes on to the next server.

State only: `server` moves the bytes, `engine` computes. All positions' outputs stay until the session ends:
they are what a server that takes over the next stage is rebuilt from. Everything here is bounded by the
capacity that admission charged for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

import torch

from shoal.protocol.errors import MessageInvalid, ShoalError, Stale
from shoal.protocol.identity import VerifiedPeer
from shoal.training.serving.cache import Cache
from shoal.training.serving.messages import LENGTH, STOP, OpenSession, SamplingOptions, SessionRoute
from shoal.training.serving.versions import ServingVersion


class HostedSession:
    """One session. `changed` wakes whoever waits for its state."""

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
        self.received = self.computed = 0
        self.since_s = self.active_s = now_s  # of the oldest position that waits; of the last movement
        self.route: SessionRoute | None = None
        self.cut: tuple[int, str] | None = None  # epoch and reason, to tell the client
        self.failure: ShoalError | None = None
        self._waiting: deque[torch.Tensor] = deque()
        self._outputs = torch.empty(0 if last else opening.capacity, width)  # takes memory as it is written
        self._feeder_epoch = -1
        self._change = asyncio.Event()
        if first:
            self._enqueue(torch.tensor(tokens, dtype=torch.int64), now_s)

    # --- input

    def attach(self, epoch: int) -> None:
        """The server before begins to supply. Raises Stale if another one did later."""
        if epoch < self._feeder_epoch:
            raise Stale(f"this session is fed by epoch {self._feeder_epoch}, you come with {epoch}")
        self._feeder_epoch = epoch

    def take(self, epoch: int, start: int, rows: torch.Tensor, now_s: float) -> None:
        """Positions from `start`; those that are here already are passed over.

        Raises Stale when another server feeds it now, MessageInvalid for a gap or more than was asked for.
        """
        self.attach(epoch)
        if start > self.received or start + len(rows) > self.capacity:
            room = f"{self.received} of {self.capacity} positions are here"
            raise MessageInvalid(f"positions {start} to {start + len(rows)} do not fit: {room}")
        self._enqueue(rows[self.received - start :], now_s)

    def _enqueue(self, rows: torch.Tensor, now_s: float) -> None:
        if len(rows):
            if not self.waiting:
                self.since_s = now_s
            self.active_s = now_s
            self._waiting.append(rows)
            self.received += len(rows)
            self.notify()

    @property
    def waiting(self) -> int:
        """Positions that are here and not computed."""
        return self.received - self.computed if not self.finish else 0

    @property
    def runs(self) -> bool:
        """Rows have come, and more are to come."""
        return self.received > 0 and not self.finish and self.failure is None

    def next_rows(self, count: int) -> torch.Tensor:
        """The first `count` of those that wait; they are gone from here then."""
        taken: list[torch.Tensor] = []
        while count:
            rows = self._waiting.popleft()
            if len(rows) > count:
                self._waiting.appendleft(rows[count:])
                rows = rows[:count]
            taken.append(rows)
            count -= len(rows)
        return torch.cat(taken)

    # --- output

    def computed_rows(
        self, count: int, hidden: torch.Tensor | None, drawn: Sequence[int], now_s: float
    ) -> None:
        """`count` more positions are cached: their hidden states [count, width] or the tokens drawn."""
        if hidden is not None:
            self._outputs[self.computed : self.computed + count] = hidden
        self.computed += count
        self.since_s = self.active_s = now_s
        for token in drawn:
            self.tokens.append(token)
            self.finish = self.finish_of(len(self.tokens), token)
        if self.first and self.last and not self.finish and drawn:
            self._enqueue(torch.tensor(drawn), now_s)
        self.notify()

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

    def outputs(self, start: int, stop: int) -> torch.Tensor:
        """What the next server takes for these positions: hidden states, or tokens int64."""
        return torch.tensor(self.tokens[start:stop]) if self.last else self._outputs[start:stop]

    # --- life

    def fail(self, error: ShoalError) -> None:
        """The client shall be told, and the session end."""
        self.failure = self.failure or error
        self.notify()

    async def next_route(self, known: SessionRoute | None) -> SessionRoute:
        """The route that the client names, once it is another one than this."""
        while self.route is None or self.route is known:
            await self.changed()
        return self.route

    def notify(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    async def changed(self) -> None:
        """Returns after the next change."""
        await self._change.wait()
