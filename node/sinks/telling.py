"""Tells sinks what the owner's view shows, each on a thread of its own: nobody waits for a disk or a service.

What a sink does not take in time is dropped, the oldest first. What it refuses is told once; it is asked
again with the next Snapshot, and training does not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from shoal.node.events import Events
from shoal.node.sinks.scalars import Scalar, Scalars
from shoal.node.view.snapshot import Snapshot

WAITING = 64  # snapshots; at one in ten seconds ten minutes
CLOSE_S = 10.0  # so long is waited for a sink at the end
UNWRITTEN = 10_000  # points, of a sink that refuses them


class Sink(Protocol):
    """Where figures go. Blocking, one thread at a time; it may raise anything."""

    title: str
    fresh: bool  # nothing of this run is there yet

    def write(self, scalars: Sequence[Scalar]) -> None: ...

    def close(self) -> None: ...


class Teller:
    """One sink and its thread."""

    def __init__(self, sink: Sink, events: Events) -> None:
        self._sink, self._events = sink, events
        self._scalars = Scalars(from_the_start=sink.fresh)
        self._waiting: queue.Queue[Snapshot | None] = queue.Queue(WAITING)
        self._trouble = self._told = ""
        self._thread = threading.Thread(target=self._run, name=sink.title, daemon=True)
        self._thread.start()

    def take(self, snapshot: Snapshot) -> None:
        """To be written; never blocks."""
        self._put(snapshot)
        if self._trouble != self._told:
            self._told = self._trouble
            text = f"{self._sink.title} takes figures again"
            if self._told:
                text = f"{self._sink.title} takes no figures: {self._told}"
            self._events("sink", {"text": text})

    async def close(self) -> None:
        """What waits is written, unless that takes too long."""
        self._put(None)
        await asyncio.to_thread(self._thread.join, CLOSE_S)

    def _put(self, what: Snapshot | None) -> None:
        while True:
            try:
                return self._waiting.put_nowait(what)
            except queue.Full:
                with contextlib.suppress(queue.Empty):
                    self._waiting.get_nowait()

    def _run(self) -> None:
        newest: Snapshot | None = None
        unwritten: list[Scalar] = []
        while (snapshot := self._waiting.get()) is not None:
            newest = snapshot
            unwritten = self._written([*unwritten, *self._scalars.of(snapshot)])
        if newest is not None:
            self._written([*unwritten, *self._scalars.of(newest, last=True)])
        with contextlib.suppress(Exception):  # a library's own; there is nobody left to tell
            self._sink.close()

    def _written(self, scalars: list[Scalar]) -> list[Scalar]:
        """What the sink did not take."""
        try:
            self._sink.write(scalars)
        except Exception as error:  # a library's own, of whatever kind
            self._trouble = (str(error) or repr(error)).partition("\n")[0][:200]
            return scalars[-UNWRITTEN:]
        self._trouble = ""
        return []


@contextlib.asynccontextmanager
async def telling(sinks: Sequence[Sink], events: Events) -> AsyncIterator[Callable[[Snapshot], None]]:
    """Takes Snapshots for all of `sinks` while the context lasts."""
    tellers = [Teller(sink, events) for sink in sinks]

    def take(snapshot: Snapshot) -> None:
        for teller in tellers:
            teller.take(snapshot)

    try:
        yield take
    finally:
        await asyncio.gather(*(teller.close() for teller in tellers))
