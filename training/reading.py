"""What a driver reads: the feed and the book of its streams, kept in step. A first stage's trainer has one.

Which streams they are follows from the log and from what the other drivers' beats claim (`streams`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import torch

from shoal.dht.view import SwarmView
from shoal.protocol.identity import PeerId
from shoal.training.data.stream_book import StreamBook
from shoal.training.feed import Feed
from shoal.training.outer.policy import SILENT_S
from shoal.training.outer.service import Outer
from shoal.training.pipeline.successors import Event
from shoal.training.streams import Reader, Streams, readers, unmet


class Reading:
    """Made once the log is known; `streams` decides, from then on, what `next_batch` draws from."""

    def __init__(
        self, feed: Feed, book: StreamBook, outer: Outer, view: Callable[[], SwarmView], event: Event
    ) -> None:
        self._feed = feed
        self._book = book
        self._outer = outer
        self._view = view
        self._unmet = frozenset[PeerId]()  # other drivers of whom only the log told when this one began
        self._unmet_until_s: float | None = None
        me = outer.context.me
        self.streams = Streams(me, feed.own, self._others, outer.positions, outer.readers, self._read, event)
        self.streams.begin()

    async def next_batch(self) -> torch.Tensor:
        """The tokens of the next micro-batch; waits while there is no stream to read."""
        return self._book.draw(await self._feed.next_batch())

    def _read(self, positions: Mapping[int, int]) -> None:
        self._feed.read(positions)
        self._book.read(positions)

    def _others(self) -> list[Reader]:
        last = [PeerId(seat.peer) for seat in self._outer.last_seats]
        view, logged_by, now_s = self._view(), self._outer.readers(), asyncio.get_running_loop().time()
        if self._unmet_until_s is None:
            self._unmet, self._unmet_until_s = unmet(view, logged_by, last), now_s + SILENT_S
        return readers(view, logged_by, last, self._unmet if now_s < self._unmet_until_s else ())
