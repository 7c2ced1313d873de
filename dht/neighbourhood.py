"""Keeps heartbeat streams: dials the neighbours it is given, answers those who dial, looks into suspicions.

Of a pair, the lower id dials at once and the higher one only if nothing came within INBOUND_WAIT_S, or sooner
if it is new to a small swarm: it may not be known yet, and has to know who lives. If both dialled, the higher
one's stream is ended. A stream that breaks is dialled again at once by both: a machine that refuses at once
says that the process is gone, long before silence could. `members` owns one.
"""

from __future__ import annotations

import asyncio
import logging

from shoal.dht.beats import METHOD
from shoal.dht.link import Home, Link
from shoal.dht.liveness import GONE_SILENCE_S
from shoal.protocol.errors import Busy, PeerUnreachable, ShoalError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Channel, Stream, Transport

INBOUND_WAIT_S = 1.0  # below SUSPECT_SILENCE_S: else every one-sided wish would raise a suspicion
NEW_S, NEWCOMERS_WAIT_S = 1.0, 0.4  # for so long after it met the first; two first looks into the directory
REFUSED_WITHIN_S = 1.0  # a dial that took longer met silence too, at some other address of the peer
REDIAL_S = 0.1  # doubled by each failure ...
REDIAL_MOST_S = 15.0  # ... up to this; a peer that returns without a directory is met again this soon
SHORT_STREAM_S = 1.0  # a stream that ends sooner counts as a failure too
SPACING_S = 0.1  # between two dials of one peer, however many reasons there are
PROBES = 64  # at once
PROBE_SLACK_S = 0.5  # for the verdict on a peer that did not answer to be spoken
LINKS_PER_PEER = 4  # one serves; more exist only while both ends notice a break or a restart
LINKS_MOST = 512

log = logging.getLogger(__name__)


class _Door:
    """The streams to one peer, and what its keeper waits for."""

    def __init__(self) -> None:
        self.links: list[Link] = []
        self.changed = asyncio.Event()  # a stream opened, was heard or closed, or is no longer wanted

    def heard(self) -> int:
        """Streams that carried a beat; the others may yet turn out to lead nowhere."""
        return sum(link.heard for link in self.links)


class Neighbourhood:
    """Streams to neighbours. All tasks are owned here and end with `close`."""

    def __init__(self, home: Home, transport: Transport) -> None:
        self._home = home
        self._transport = transport
        self._doors: dict[PeerId, _Door] = {}
        self._keepers: dict[PeerId, asyncio.Task[None]] = {}
        self._probes: dict[PeerId, asyncio.Task[None]] = {}
        self._watched: frozenset[PeerId] = frozenset()
        self._wanted: frozenset[PeerId] = frozenset()
        self._closing = False
        self._begun_s: float | None = None  # when it was given its first neighbours
        self.failed_dials = 0
        self.last_failure = ""

    def links(self) -> list[Link]:
        return [link for door in self._doors.values() for link in door.links]

    def heard_streams(self, peer: PeerId) -> int:
        """Open streams with a peer that have carried a beat."""
        return self._doors[peer].heard() if peer in self._doors else 0

    def keep(self, watched: frozenset[PeerId], sought: frozenset[PeerId]) -> None:
        """Hold streams to `watched`, from whom beats are due; dial `sought`, who are gone, now and then."""
        self._watched, self._wanted = watched, watched | sought
        if self._wanted and self._begun_s is None:
            self._begun_s = self._now()
        for peer in sorted(watched):
            self._home.table.watch(peer, True, self._now())
        for peer in self._home.table:
            if peer not in self._wanted and peer not in self._probes:
                self._let_go(peer)
        for peer in sorted(self._keepers.keys() - self._wanted):
            self._door(peer).changed.set()
        for peer in sorted(self._wanted - self._keepers.keys()):
            self._keepers[peer] = asyncio.create_task(self._keep(peer), name=f"keep {peer}")

    def look_into(self, peer: PeerId) -> None:
        """Somebody doubts that this peer lives: ask it, unless its keeper or a stream will tell anyway."""
        told = peer in self._keepers or peer in self._probes or self.heard_streams(peer)
        if not told and not self._closing and len(self._probes) < PROBES and self._present(peer):
            self._home.table.watch(peer, True, self._now())
            self._probes[peer] = asyncio.create_task(self._probe(peer), name=f"probe {peer}")

    async def answer(self, stream: Stream) -> None:
        """Serves method "beat"."""
        peer = stream.remote.peer
        inbound = [link for link in self.links() if not link.dialled]
        if len(inbound) >= LINKS_MOST or sum(link.peer == peer for link in inbound) >= LINKS_PER_PEER:
            raise Busy(f"{self._home.me} holds {len(inbound)} heartbeat streams; ask another peer", 5.0)
        await self._run(Link(self._home, stream, dialled=False, on_heard=self._heard))

    def drop(self, peer: PeerId) -> None:
        """It is shut out: dial it no more. `Transport.disconnect` closes its streams."""
        for tasks in (self._keepers, self._probes):
            if (task := tasks.pop(peer, None)) is not None:
                task.cancel()
        self._tidy(peer)

    async def say_goodbye(self, reason: str, within_s: float) -> None:
        """Tell all neighbours, dial nobody any more, and wait until they ended their streams."""
        self._closing = True
        self._wanted = self._watched = frozenset()
        for link in self.links():
            link.say_goodbye(reason)
        try:
            async with asyncio.timeout(within_s):
                while self.links():
                    await self._change(self._doors[self.links()[0].peer], None)
        except TimeoutError:
            log.info("some neighbours did not take the goodbye", extra={"streams": len(self.links())})

    async def close(self) -> None:
        tasks = [*self._keepers.values(), *self._probes.values()]
        self._closing = True
        self._wanted = self._watched = frozenset()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- one neighbour

    async def _keep(self, peer: PeerId) -> None:
        """Hold a stream with one peer for as long as it is wanted."""
        door = self._door(peer)
        failures = 0
        if self._home.me > peer and not door.links:
            await self._change(door, NEWCOMERS_WAIT_S)
            if not door.links and not self._is_new():
                await self._change(door, INBOUND_WAIT_S - NEWCOMERS_WAIT_S)
        while peer in self._wanted and self._present(peer):
            if door.links:
                await self._change(door, None)
                failures = 0
                continue
            dialled_s = self._now()
            heard = await self._dial(peer, once=False)
            if heard and self._now() - dialled_s > SHORT_STREAM_S:
                failures = 0
            elif not door.links:
                failures += 1
                self._home.table.streams(peer, 0, self._now())
                wait_s = min(REDIAL_MOST_S, REDIAL_S * 2.0 ** min(failures - 1, 16))
                await self._change(door, wait_s * self._home.rng.uniform(0.5, 1.0))
            await asyncio.sleep(max(0.0, dialled_s + SPACING_S - self._now()))
        self._keepers.pop(peer, None)
        self._tidy(peer)

    async def _probe(self, peer: PeerId) -> None:
        """One stream, for one beat. Whoever neither answers nor refuses falls silent in the table."""
        began_s = self._now()
        if not await self._dial(peer, once=True):
            await asyncio.sleep(
                began_s + GONE_SILENCE_S + PROBE_SLACK_S - self._now()
            )  # beats stay due so long
        self._probes.pop(peer, None)
        self._tidy(peer)

    async def _dial(self, peer: PeerId, once: bool) -> bool:
        """Open a stream and stay on it to its end; whether it carried a beat."""
        began_s = self._now()
        link: Link | None = None
        try:
            async with self._transport.open(peer, METHOD, Channel.CONTROL) as stream:
                link = Link(self._home, stream, dialled=True, on_heard=self._heard, once=once)
                await self._run(link)
        except ShoalError as error:
            heard = link is not None and link.heard
            self.failed_dials += not heard
            self.last_failure = f"{peer}: {error}"
            log.debug("heartbeat stream failed", extra={"peer": peer, "error": str(error)})
            if _refused(error) and self._now() - began_s < REFUSED_WITHIN_S and not self.heard_streams(peer):
                self._home.table.refused(peer, self._now())
        return link is not None and link.heard

    async def _run(self, link: Link) -> None:
        """Converse on one stream, and see to what its end means."""
        door = self._door(link.peer)
        door.links.append(link)
        broke = True
        try:
            await link.run()
            broke = False
        finally:
            door.links.remove(link)
            door.changed.set()
            self._ended(link.peer, door, broke and link.heard)
            self._tidy(link.peer)

    def _ended(self, peer: PeerId, door: _Door, broke: bool) -> None:
        if door.heard() or self._closing:
            return
        if broke:
            self._home.table.streams(peer, 0, self._now())
            if peer not in self._wanted and peer not in self._probes:
                self.look_into(peer)
        elif peer not in self._watched:
            self._let_go(peer)
        # an orderly end with somebody we want: the keeper dials at once, and its failure would tell

    def _heard(self, link: Link) -> None:
        """The first beat on a stream: it counts from now on; of two streams, the lower id's stays."""
        door = self._door(link.peer)
        self._home.table.streams(link.peer, door.heard(), self._now())
        door.changed.set()
        if link.once or (link.peer not in self._wanted and link.dialled):
            link.finish()
        kept_is_dialled = self._home.me < link.peer
        if any(other.heard and other.dialled is kept_is_dialled for other in door.links):
            for other in door.links:
                if other.dialled and not kept_is_dialled:
                    other.finish()

    def _let_go(self, peer: PeerId) -> None:
        """No beats are due any more: end what we dialled; without a stream its record speaks for it."""
        now = self._now()
        if peer in self._doors:
            for link in self._doors[peer].links:
                if link.dialled:
                    link.finish()
        if not self.heard_streams(peer):
            self._home.table.unwatch_living(peer, now)
            self._home.table.streams(peer, 0, now)

    # --- small things

    async def _change(self, door: _Door, wait_s: float | None) -> None:
        door.changed.clear()
        try:
            async with asyncio.timeout(wait_s):
                await door.changed.wait()
        except TimeoutError:
            return

    def _is_new(self) -> bool:
        """To a small swarm; of a large one it meets a part only, and most of what it knows are records."""
        since_s = self._now() if self._begun_s is None else self._begun_s
        return self._now() - since_s < NEW_S and all(peer in self._wanted for peer in self._home.table)

    def _present(self, peer: PeerId) -> bool:
        entry = self._home.table.get(peer)
        return entry is not None and not entry.said_goodbye

    def _door(self, peer: PeerId) -> _Door:
        return self._doors.setdefault(peer, _Door())

    def _tidy(self, peer: PeerId) -> None:
        door = self._doors.get(peer)
        if door and not door.links and peer not in self._keepers and peer not in self._probes:
            del self._doors[peer]

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _refused(error: ShoalError) -> bool:
    """Whether a machine answered that nobody listens there: both transports quote the system's words.

    An unknown address or a network that is down also fails at once, but says nothing of the peer.
    """
    return isinstance(error, PeerUnreachable) and "connection refused" in str(error).lower()
