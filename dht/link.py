"""One heartbeat stream between two neighbours, the same code at both ends.

`speak` sends what is due: own record, beats with offers of records, wanted records, newer lists of the
owner's, goodbye. `listen` feeds what comes into the table. Nothing is queued: a link remembers what the
other side lacks (bounded), and sends that when its turn comes, so a slow neighbour costs no memory.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from shoal.dht.beats import (
    NAMES_IN_MESSAGE,
    RECORDS_IN_MESSAGE,
    Beat,
    Goodbye,
    RosterEntry,
    RosterRecords,
    RosterWant,
)
from shoal.dht.directory import SignedRecord
from shoal.dht.table import Entry, MemberTable
from shoal.protocol.amendments import AmendmentBook, SignedAmendments
from shoal.protocol.errors import PeerSilent, RecordInvalid, StorageError, StreamEnded
from shoal.protocol.identity import PeerId
from shoal.protocol.revocation import ENTRIES_BYTES, RevocationBook, RevocationNotice, SignedRevocations
from shoal.protocol.transport import Stream
from shoal.protocol.wire import changed

SILENT_LINK_S = 15.0  # a stream without a beat for this long is given up, even if nobody closed it
FINISH_S = 2.0  # for the other side to end its half
REPEATED_OFFERS = 4  # records offered again: an answer may have been lost with another stream
REPEATED_EVERY = 4  # beats of a link: there are many links ...
REPEATED_AT_FIRST_S = 10.0  # ... but at every beat so long, while streams are opened twice and ended again
_SENT_KEPT = 16  # own beats whose echo may still come
_ASKED_MOST = 1024  # names held of what one link wants, or owes
_KINDS = (Beat, RosterRecords, RosterWant, RevocationNotice, SignedAmendments, Goodbye)

log = logging.getLogger(__name__)


class Home(Protocol):
    """What a link needs of the `Members` it belongs to."""

    me: PeerId
    heartbeat_s: float
    rng: random.Random
    table: MemberTable
    revocations: RevocationBook
    amendments: AmendmentBook

    def own_record(self) -> tuple[SignedRecord, int, int]:
        """This peer's newest record, its incarnation and its sequence."""

    def own_beat(self) -> Beat:
        """The beat to send now, but for the fields that belong to a link."""

    async def learn(self, records: tuple[SignedRecord, ...], source: str) -> None:
        """Verify records and take in the good ones."""

    def concerns(self, peer: PeerId, entry: Entry) -> bool:
        """Whether `peer`, a neighbour, keeps such a record."""

    def lacking(self, entries: tuple[RosterEntry, ...]) -> list[PeerId]:
        """Those offered records that are worth asking for."""


class Link:
    """Runs the conversation on one stream until either side ends it or it breaks."""

    def __init__(
        self,
        home: Home,
        stream: Stream,
        *,
        dialled: bool,
        on_heard: Callable[[Link], None],
        once: bool = False,
    ) -> None:
        self.peer = stream.remote.peer
        self.dialled = dialled  # by us
        self.once = once  # only to hear one beat
        self.heard = False  # a beat; until then the stream may lead nowhere
        self._on_heard = on_heard
        self._home = home
        self._stream = stream
        self._wake = asyncio.Event()
        self._beat_now = True
        self._finish = False
        self._goodbye: str | None = None
        self._sent_sequence = -1
        self._told_revocations = 0  # the list's version that the other side has, or was sent
        self._told_amendments = 0
        self._sent_s: OrderedDict[int, float] = OrderedDict()
        self._number = 0
        self._heard_number = 0
        self._begun_s = self._heard_s = asyncio.get_running_loop().time()
        self._echoed = 0
        self._offered = 0
        self._repeated = 0
        self._told: dict[PeerId, RosterEntry] = {}  # offered by the other side since our last beat
        self._wanted: dict[PeerId, None] = {}
        self._owed: dict[PeerId, None] = {}

    # --- what the owner may do

    def beat_now(self) -> None:
        """Something changed: do not wait for the next beat's time."""
        self._beat_now = True
        self._wake.set()

    def nudge(self) -> None:
        """There may be something to send besides beats."""
        self._wake.set()

    def finish(self) -> None:
        """End this stream in order; another one serves, or this neighbour is no longer needed."""
        self._finish = True
        self._wake.set()

    def say_goodbye(self, reason: str) -> None:
        self._goodbye = reason
        self._wake.set()

    async def run(self) -> None:
        """Until the stream ends in order. Raises what breaks it."""
        speaking = asyncio.create_task(self._speak())
        listening = asyncio.create_task(self._listen())
        try:
            await asyncio.wait((speaking, listening), return_when=asyncio.FIRST_COMPLETED)
            (speaking if speaking.done() else listening).result()
            self.finish()  # one half ended in order: so shall the other
            async with asyncio.timeout(FINISH_S):
                await speaking
                await listening
        except TimeoutError:
            raise PeerSilent(f"{self.peer} did not end its heartbeat stream within {FINISH_S:g} s") from None
        finally:
            speaking.cancel()
            listening.cancel()
            await asyncio.gather(speaking, listening, return_exceptions=True)

    # --- sending

    async def _speak(self) -> None:
        loop = asyncio.get_running_loop()
        next_beat_s = loop.time()
        while not self._finish:
            self._wake.clear()
            await self._send_own_record()
            if self._goodbye is not None:
                await self._stream.send(Goodbye(self._home.own_record()[1], self._goodbye))
                break
            await self._send_lists()
            self._check_silence(loop.time())
            due = self._beat_now or loop.time() >= next_beat_s
            if due and self._home.table.get(self.peer) is not None:  # no beats for refused records
                self._beat_now = False
                next_beat_s = loop.time() + self._home.heartbeat_s * self._home.rng.uniform(0.8, 1.0)
                await self._send_beat(loop.time())
            await self._send_wants()
            await self._send_owed()
            timer = loop.call_at(max(next_beat_s, loop.time() + 0.1), self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()
        await self._stream.end()

    async def _send_own_record(self) -> None:
        signed, _, sequence = self._home.own_record()
        if sequence != self._sent_sequence:
            self._sent_sequence = sequence
            await self._stream.send(RosterRecords((signed,)))

    async def _send_lists(self) -> None:
        if not self.heard:
            return
        revocations, amendments = self._home.revocations, self._home.amendments
        if revocations.signed is not None and revocations.version > self._told_revocations:
            self._told_revocations = revocations.version
            await self._stream.send(revocations.signed.notice, revocations.signed.entries)
        if amendments.signed is not None and amendments.version > self._told_amendments:
            self._told_amendments = amendments.version
            await self._stream.send(amendments.signed)

    async def _send_beat(self, now: float) -> None:
        self._number += 1
        self._sent_s[self._number] = now
        if len(self._sent_s) > _SENT_KEPT:
            self._sent_s.popitem(last=False)
        beat = changed(
            self._home.own_beat(),
            number=self._number,
            heard_number=self._heard_number,
            held_s=now - self._heard_s if self._heard_number else 0.0,
            offers=self._offers(now),
        )
        await self._stream.send(beat)

    def _check_silence(self, now: float) -> None:
        if now - self._heard_s > SILENT_LINK_S:
            raise PeerSilent(
                f"{self.peer} sent no beat for {now - self._heard_s:.1f} s; the stream is given up"
            )

    def _offers(self, now: float) -> tuple[RosterEntry, ...]:
        """What was learned since the last beat, and at times a few others in turn; not what we were told."""
        table = self._home.table
        found, self._offered = table.learned_after(self._offered, NAMES_IN_MESSAGE - REPEATED_OFFERS)
        if now - self._begun_s < REPEATED_AT_FIRST_S or self._number % REPEATED_EVERY == 0:
            self._repeated += REPEATED_OFFERS
            found += table.some(self._repeated, REPEATED_OFFERS)
        told, self._told = self._told, {}
        return tuple(
            [
                entry.offer
                for entry in found
                if entry.offer.peer != self.peer
                and entry.gone_s is None
                and told.get(entry.offer.peer) != entry.offer
                and self._home.concerns(self.peer, entry)
            ]
        )

    async def _send_wants(self) -> None:
        while self._wanted:
            names = tuple(self._wanted)[:NAMES_IN_MESSAGE]
            for name in names:
                del self._wanted[name]
            await self._stream.send(RosterWant(names))

    async def _send_owed(self) -> None:
        while self._owed:
            names = tuple(self._owed)[:RECORDS_IN_MESSAGE]
            for name in names:
                del self._owed[name]
            entries = (self._home.table.get(name) for name in names)
            records = tuple(entry.signed for entry in entries if entry is not None)
            if records:
                await self._stream.send(RosterRecords(records))

    # --- receiving

    async def _listen(self) -> None:
        while True:
            try:
                message = await self._stream.receive(*_KINDS, max_payload_bytes=ENTRIES_BYTES)
            except StreamEnded:
                return
            await self._take(message.header, message.payload)

    async def _take(self, header: Any, payload: memoryview) -> None:
        match header:
            case Beat():
                self._take_beat(header)
            case RosterRecords(records):
                await self._home.learn(records, f"{self.peer}'s heartbeat stream")
                self._wake.set()
            case RosterWant(peers):
                if self._home.me in peers:
                    self._sent_sequence = -1
                self._remember(self._owed, peers)
            case RevocationNotice():
                self._told_revocations = max(self._told_revocations, header.version)
                signed = SignedRevocations(header, bytes(payload))
                self._adopt(lambda: self._home.revocations.adopt(signed))
            case SignedAmendments():
                self._adopt(lambda: self._home.amendments.adopt(header))
            case Goodbye(incarnation, reason):
                now = asyncio.get_running_loop().time()
                self._home.table.goodbye(self.peer, incarnation, reason or "said goodbye", now)

    def _adopt(self, adopt: Callable[[], bool]) -> None:
        try:
            adopt()
        except StorageError as error:  # it counts all the same, until this process ends
            log.error("a list of the owner's was not stored", extra={"error": str(error)})

    def _take_beat(self, beat: Beat) -> None:
        now = asyncio.get_running_loop().time()
        entry = self._home.table.get(self.peer)
        if entry is None:
            raise RecordInvalid(f"{self.peer} beats, but no valid record of it came first")
        rtt_s = None
        if beat.heard_number > self._echoed and (sent_s := self._sent_s.get(beat.heard_number)) is not None:
            self._echoed = beat.heard_number
            rtt_s = max(0.0, now - sent_s - beat.held_s)
        self._heard_number, self._heard_s = beat.number, now
        self._told_revocations = max(self._told_revocations, beat.revocation_version)
        self._told_amendments = max(self._told_amendments, beat.amendment_version)
        if beat.record_sequence > entry.record.sequence:
            self._remember(self._wanted, (self.peer,))
        if beat.offers:
            if len(self._told) < _ASKED_MOST:
                self._told.update((offer.peer, offer) for offer in beat.offers)
            self._remember(self._wanted, self._home.lacking(beat.offers))
        revocations, amendments = self._home.revocations.version, self._home.amendments.version
        if revocations > self._told_revocations or amendments > self._told_amendments:
            self._wake.set()
        if not self.heard:
            self.heard = True
            self._on_heard(self)
        self._home.table.beat(self.peer, beat, now, rtt_s)

    def _remember(self, names: dict[PeerId, None], more: tuple[PeerId, ...] | list[PeerId]) -> None:
        """Beyond the cap the rest is forgotten; a later offer or want brings it back."""
        for name in more:
            if len(names) < _ASKED_MOST:
                names[name] = None
        if names:
            self._wake.set()
