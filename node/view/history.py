"""History: what the coordinator keeps on disk, written off the loop a second after it happened.

Nobody waits for the disk. What it refuses is kept for a while, then the oldest is dropped and counted; the
trouble is stated in the snapshot, and goes away when the disk takes something again.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from shoal.node.view.archive import Archive, Contribution, Entry, Start, Write
from shoal.node.view.plain import plain
from shoal.node.view.snapshot import EVENTS, Snapshot
from shoal.protocol.errors import ShoalError, StorageError, UsageError
from shoal.protocol.unbroken import unbroken

QUEUE = 8192  # events that wait for the disk
SAMPLES = 4096
FLUSH_S, RETRY_S, TIDY_S = 1.0, 10.0, 300.0
EVENTS_AT_START = 1000
Offload = Callable[..., Awaitable[Any]]


class History:
    """`start`, then `run` until cancelled; `close` writes what is left."""

    def __init__(self, archive: Archive, offload: Offload, clock: Callable[[], float]) -> None:
        """`offload(fn, *args)` must run one call at a time, on a thread of its own. `clock`: Unix seconds."""
        self.lost = 0  # events that the disk did not take in time
        self.trouble = ""
        self.used_bytes: int | None = None
        self._archive = archive
        self._offload = offload
        self._clock = clock
        self._entries: deque[Entry] = deque()
        self._samples: deque[tuple[str, float, float]] = deque(maxlen=SAMPLES)
        self._contributions: dict[tuple[str, int], Contribution] = {}
        self._frame: Snapshot | None = None

    @property
    def queue(self) -> int:
        return len(self._entries)

    @property
    def state(self) -> str:
        """In words."""
        return f"not kept: {self.trouble}" if self.trouble else f"kept in {self._archive.path}"

    async def start(self) -> Start:
        """What there is; nothing where the disk refuses. Then numbers begin above all that may lie there."""
        for _ in range(2):  # a damaged file is put aside by the first
            try:
                found: Start = await self._offload(self._archive.start, EVENTS_AT_START, self._clock())
            except StorageError as error:
                self._refused(error)
            else:
                self.trouble = ""
                return found
        return Start(number=int(1000 * self._clock()), heard={}, events=())

    def add(self, entry: Entry) -> None:
        """To be written."""
        if len(self._entries) >= QUEUE:
            self._entries.popleft()
            self.lost += 1
        self._entries.append(entry)

    def sample(self, name: str, at: float, value: float) -> None:
        """One point of a series."""
        self._samples.append((name, at, value))

    def contributed(self, done: Contribution) -> None:
        """The newest of a process replaces those before."""
        if len(self._contributions) < QUEUE or (done.peer, done.process) in self._contributions:
            self._contributions[done.peer, done.process] = done

    def frame(self, snapshot: Snapshot) -> None:
        """The run as it is; of two that wait for the disk the newer is kept."""
        self._frame = snapshot

    async def run(self) -> None:
        """Write and tidy until cancelled."""
        loop = asyncio.get_running_loop()
        tidied_s = loop.time()
        while True:
            await asyncio.sleep(FLUSH_S)
            if not await self.flush():
                await asyncio.sleep(RETRY_S - FLUSH_S)
            elif loop.time() - tidied_s >= TIDY_S:
                tidied_s = loop.time()
                try:
                    self.used_bytes = await self._offload(self._archive.tidy, self._clock())
                except StorageError as error:
                    self._refused(error)

    async def flush(self) -> bool:
        """Write what waits; whether the disk took it. Cancelled or not: nothing may be lost on the way."""
        return await unbroken(self._flush())

    async def _flush(self) -> bool:
        if not (self._entries or self._samples or self._contributions or self._frame):
            return True
        write = Write(
            entries=tuple(self._entries),
            samples=tuple(self._samples),
            contributions=tuple(self._contributions.values()),
            frames=(self._frame,) if self._frame else (),
        )
        self._frame = None
        self._entries.clear()
        self._samples.clear()
        self._contributions.clear()
        try:
            self.used_bytes = await self._offload(self._archive.write, write)
        except StorageError as error:
            self._refused(error)
            self._give_back(write)
            return False
        self.trouble = ""
        return True

    async def close(self) -> None:
        """After `run`."""
        await self.flush()
        await self._offload(self._archive.close)

    async def ask(self, request: dict[str, Any]) -> dict[str, object]:
        """The control action `history`; the keys are those below. Raises UsageError and StorageError."""
        await self.flush()
        archive = self._archive
        try:
            most = int(request.get("most", 500))
            match request.get("what"):
                case "events":
                    after, newest = int(request.get("after", 0)), bool(request.get("newest", False))
                    kind, peer = (_text(request.get(key)) for key in ("kind", "peer"))
                    rows = await self._offload(lambda: archive.events(after, kind, peer, most, newest=newest))
                    return {"events": plain(rows)}
                case "series":
                    name, since = str(request.get("name")), float(request.get("since", 0.0))
                    points = int(request.get("points", 300))
                    until = float(request.get("until", math.inf))
                    return {"points": await self._offload(archive.series, name, since, points, until)}
                case "span":
                    return {"span": await self._offload(archive.span)}
                case "moment":
                    moment: dict[str, object] = await self._offload(_moment, archive, float(request["at"]))
                    return moment
                case "names":
                    return {"names": await self._offload(archive.series_names)}
                case "contributors":
                    return {"contributors": await self._offload(archive.contributors, most)}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"history: {error}") from error
        raise UsageError("history knows what: events, series, names, contributors, span, moment")

    def _give_back(self, write: Write) -> None:
        """What was not written waits again, before what came meanwhile."""
        room = max(0, QUEUE - len(self._entries))
        kept = write.entries[max(0, len(write.entries) - room) :]
        self.lost += len(write.entries) - len(kept)
        self._entries.extendleft(reversed(kept))
        waiting = [*write.samples, *self._samples]
        self._samples.clear()
        self._samples.extend(waiting)  # the oldest fall out
        for done in write.contributions:
            self._contributions.setdefault((done.peer, done.process), done)

    def _refused(self, error: ShoalError) -> None:
        self.trouble = str(error).splitlines()[0]


def _moment(archive: Archive, at: float) -> dict[str, object]:
    """A Snapshot's JSON with the events until then, and the moments beside it. Raises UsageError."""
    frame = archive.frame(at)
    if frame is None:
        raise UsageError("the history keeps no moment of this run yet\nlook again in ten seconds")
    rows = archive.events(0, None, None, EVENTS, newest=True, until=frame.at)
    shown = {**frame.snapshot, "events": plain(rows)}
    return {"snapshot": shown, "at": frame.at, "before": frame.before, "after": frame.after}


def _text(value: object) -> str | None:
    return None if value is None else str(value)
