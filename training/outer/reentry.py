"""Reentering: a round in which nobody contributes; every member fetches a lost entry's parts by digest.

Stands where `Round` stands, between GO and COMMIT, at every member, the leader among them, which holds the
lost entry. What a majority cannot fetch is not committed, like any other part.
"""

from __future__ import annotations

import asyncio
import logging

from shoal.protocol.errors import ShoalError
from shoal.protocol.identity import PeerId
from shoal.training.outer.change import Change
from shoal.training.outer.context import Context
from shoal.training.outer.contribution import Contribution
from shoal.training.outer.entry import SKIP, Entry, draft_id
from shoal.training.outer.fetch import AT_A_TIME, fetch_part
from shoal.training.outer.lost import Lost
from shoal.training.outer.reduce import Published

log = logging.getLogger(__name__)


class Reentering:
    """What one member does and holds for the re-entry of one lost entry."""

    bytes_out = 0  # what others fetch is not counted to a round
    contribution: Contribution | None = None

    def __init__(self, context: Context, data: bytes, draft: Entry, lost: Lost, deadline_s: float) -> None:
        self.draft = draft
        self.data = data
        self.id = draft_id(data)
        self.held: dict[int, Published] = {}
        self.opened_s = asyncio.get_running_loop().time()
        self._context = context
        self._source = draft.source()
        self._wanted = [p for p in range(self._source.parts) if self._source.digest(p) != SKIP][::-1]
        self._deadline_s = deadline_s
        self._change = Change()
        self._task: asyncio.Task[None] | None = None
        for part in list(self._wanted):
            found = lost.find(self._source.digest(part))
            if found is not None:
                self.held[part] = found
                self._wanted.remove(part)

    def start(self) -> None:
        """Begin; `close` ends it."""
        self._task = asyncio.create_task(self._fetch_all())

    async def close(self) -> None:
        """Stop whatever is still under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def mark_gone(self, seat: int) -> None:
        """Whoever still holds the parts serves them: no seat is waited for."""

    async def collected(self) -> None:
        """Returns when nothing more can be fetched, or at twice the deadline."""
        limit_s = self.opened_s + 2 * self._deadline_s
        await self._change.until(lambda: self._task is None or self._task.done(), lambda: limit_s)

    def report(self) -> bytes:
        """Digest of each part, zeros for what is not held; the bitmaps stay empty."""
        digests = [self.held[p].digest if p in self.held else SKIP for p in range(self._source.parts)]
        return b"".join(digests) + bytes(self.draft.bitmap_bytes * self._source.parts)

    def remainders(self, entry: Entry) -> dict[int, None]:
        """Nothing was encoded here."""
        return {}

    async def _fetch_all(self) -> None:
        holders = [self.draft.roster[seat].peer for seat in self.draft.present()]
        others = [peer for peer in holders if peer != self._context.me]
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(AT_A_TIME):
                    tasks.create_task(self._fetch(others))
        except* Exception as errors:  # a bug of ours: what is not held is not committed
            log.error("the work of a re-entry failed", exc_info=errors)
            why = "; ".join(repr(error) for error in errors.exceptions)
            self._context.event("round-failed", {"height": self.draft.height, "why": why})
        asyncio.get_running_loop().call_soon(self._change.notify)  # when this task counts as done

    async def _fetch(self, holders: list[PeerId]) -> None:
        while self._wanted:
            part = self._wanted.pop()
            try:
                self.held[part] = await fetch_part(self._context, self._source, part, holders)
            except ShoalError as error:
                self._context.event("part-not-found", {"part": part, "why": str(error)})
