"""Which data streams a driver reads: its own, and those whose driver is gone.

The first stage's log knows each stream's position and who moved it last, beats say who reads which now; of
drivers that are no neighbours the log has to do. A joiner takes an orphaned stream instead of beginning one;
what no joiner takes, one of the drivers reads in turns with its own. Who claims a stream tells it first, and
reads after a while in which nobody with a lower id has claimed it, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3

from shoal.dht.view import SwarmView
from shoal.protocol import limits
from shoal.protocol.identity import PeerId
from shoal.training.neighbours import silent_since_s
from shoal.training.outer.policy import SILENT_S

STREAMS_MOST = 8  # of one driver, as many as a contributor may name in an entry
CLAIM_S = 2.5  # from telling to reading: two beats
ORPHAN_S = 15.0  # for a joiner, or the driver itself, to come
LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Reader:
    """A driver and the streams that it claims."""

    peer: PeerId
    streams: tuple[int, ...]


def unmet(view: SwarmView, logged_by: Mapping[int, PeerId], last: Collection[PeerId]) -> frozenset[PeerId]:
    """Drivers of whom a newcomer knows from the log alone, while others of the `last` round are here.

    It may have come to one side of a cut: those others know who departed, and take what is orphaned.
    """
    here = [peer for peer in last if (known := view.get(peer)) is not None and known.heard_s is not None]
    if not any(peer != view.me for peer in here):
        return frozenset()
    return frozenset(peer for peer in logged_by.values() if view.get(peer) is None)


def readers(
    view: SwarmView,
    logged_by: Mapping[int, PeerId],
    last: Collection[PeerId] = (),
    unmet: Collection[PeerId] = (),
) -> list[Reader]:
    """The other drivers; who is silent may thaw, and keeps its streams for a while.

    Who is not heard, or was not when it went, reads what it read as the log has it (`logged_by`); in a swarm
    known in part so does a stranger among the `last` round's members, and so do the `unmet`.
    """
    by_log: dict[PeerId, list[int]] = {}
    for stream, peer in logged_by.items():
        by_log.setdefault(peer, []).append(stream)
    found: dict[PeerId, tuple[int, ...]] = {}
    for member in view.members:
        here = member.gone_s is None or view.now_s - silent_since_s(member, view.now_s) < SILENT_S
        until_s = member.gone_s if member.gone_s is not None else view.now_s
        heard = member.heard_s is not None and until_s - member.heard_s <= 2 * limits.ABORT_AFTER_S
        if member.departed or not here:
            continue
        if heard:
            found[member.peer] = member.beat.streams if member.beat is not None else ()
        elif 0 in member.stages:
            found[member.peer] = tuple(by_log.get(member.peer, ()))
    strangers = [peer for peer in (*unmet, *(last if view.sampled else ())) if view.get(peer) is None]
    found |= {peer: tuple(by_log.get(peer, ())) for peer in strangers}
    found.pop(view.me, None)
    return [Reader(peer, streams) for peer, streams in found.items() if streams]


def orphans(logged: Mapping[int, int], others: Sequence[Reader], mine: Sequence[int]) -> list[int]:
    """Streams of the log that nobody claims."""
    claimed = {stream for reader in others for stream in reader.streams} | set(mine)
    return sorted(logged.keys() - claimed)


def heir(stream: int, drivers: Sequence[Reader], last: PeerId | None = None) -> PeerId | None:
    """Which driver takes an orphan: who moved it `last`, since whoever does not hear that one takes it for
    the reader, or of those with the fewest streams the lowest hash."""
    able = [reader for reader in drivers if len(reader.streams) < STREAMS_MOST]
    able = [reader for reader in able if reader.peer == last] or able
    return min(
        able, key=lambda r: (len(r.streams), _hash(r.peer, stream)), default=Reader(PeerId(""), ())
    ).peer


def own_stream(me: PeerId, taken: Mapping[int, object]) -> int:
    """The number of a stream of this driver's own: of no other driver, and not one of `taken`."""
    number = 0
    while (stream := _hash(me, number)) in taken:
        number += 1
    return stream


def _hash(peer: PeerId, number: int) -> int:
    return int.from_bytes(blake3(f"stream {peer} {number}".encode()).digest(length=6))


class Streams:
    """One driver's claims."""

    def __init__(
        self,
        me: PeerId,
        own: int,
        others: Callable[[], Sequence[Reader]],
        logged: Callable[[], Mapping[int, int]],
        logged_by: Callable[[], Mapping[int, PeerId]],
        read: Callable[[Mapping[int, int]], None],
        event: Callable[[str, dict[str, object]], None],
    ) -> None:
        """`own`: the stream that it would begin; `others`: the other readers; `logged`: the log's positions,
        `logged_by`: who moved them; `read`: from now on these."""
        self._me = me
        self._own = own
        self._others = others
        self._logged = logged
        self._logged_by = logged_by
        self._read = read
        self._event = event
        self._claimed_s: dict[int, float] = {}  # stream -> since when
        self._reading: frozenset[int] = frozenset()
        self._orphaned_s: dict[int, float] = {}

    @property
    def claims(self) -> tuple[int, ...]:
        """For the beats."""
        return tuple(sorted(self._claimed_s))

    def begin(self) -> None:
        """Before this driver is online: its own stream if it has been here before, else an orphan."""
        logged, others = self._logged(), self._others()
        taken = {stream: None for reader in others for stream in reader.streams}
        free = orphans(logged, others, ())
        if self._own in logged and self._own not in taken:
            self._claim(self._own, settled=True)
        elif free:
            self._claim(min(free, key=lambda stream: _hash(self._me, stream)))
        else:
            self._claim_new()
        self._settle()

    async def run(self) -> None:
        """Read what is settled, give up what somebody else has, take what is left; until cancelled."""
        while True:
            self._look()
            self._settle()
            await asyncio.sleep(LOOK_S)

    def _look(self) -> None:
        now_s, others = asyncio.get_running_loop().time(), self._others()
        for reader in others:
            for stream in set(reader.streams) & self._claimed_s.keys():
                if reader.peer < self._me:
                    del self._claimed_s[stream]
                    self._event("stream-given-up", {"stream": stream, "to": reader.peer})
        if not self._claimed_s:
            self._claim_new()
        left, last = orphans(self._logged(), others, self.claims), self._logged_by()
        self._orphaned_s = {stream: self._orphaned_s.get(stream, now_s) for stream in left}
        for stream, since_s in self._orphaned_s.items():
            drivers = [*others, Reader(self._me, self.claims)]
            if now_s - since_s >= ORPHAN_S and heir(stream, drivers, last.get(stream)) == self._me:
                self._claim(stream)

    def _claim_new(self) -> None:
        logged = self._logged()
        self._claim(self._own if self._own not in logged else own_stream(self._me, logged), settled=True)

    def _claim(self, stream: int, *, settled: bool = False) -> None:
        now_s = asyncio.get_running_loop().time()
        self._claimed_s[stream] = now_s - (CLAIM_S if settled else 0.0)
        if stream in self._logged():
            self._event("stream-adopted", {"stream": stream, "position": self._logged()[stream]})

    def _settle(self) -> None:
        """Read the streams that are this driver's for sure."""
        now_s = asyncio.get_running_loop().time()
        reading = frozenset(s for s, since_s in self._claimed_s.items() if now_s - since_s >= CLAIM_S)
        if reading != self._reading:
            self._reading = reading
            logged = self._logged()
            self._read({stream: logged.get(stream, 0) for stream in sorted(reading)})
