"""Introductions: how to dial a peer of a large swarm that this one does not know, from one who named it.

Nobody knows everybody there (`circle`), but whoever names a peer to another one knows it: a hop of a chain
was called by the one before it, and a round's members and owners are named by its leader. So whoever needs a
stranger asks along such a chain, from itself outwards; a session's client sends the next server's record
along with its name. What is heard is verified as any record, and serves to dial, not to judge who is alive.
That costs a record for each stranger one works with, in a swarm of any size. Who asks too much is refused
(Busy), for somebody unknown too (NotHere); who did not introduce somebody is not asked for the same again at
once. `Members` owns one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar
from weakref import WeakValueDictionary

from shoal.dht.directory import PeerIdText, PeerRecord, SignedRecord
from shoal.dht.records import RecordBook, decoded
from shoal.dht.table import MemberTable
from shoal.protocol import limits
from shoal.protocol.contacts import ContactBook
from shoal.protocol.errors import AccessError, Busy, NotHere, ProtocolViolation, RecordInvalid, ShoalError
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Stream, Transport, call
from shoal.protocol.wire import wire_message

METHOD = "introduce"
ASK_S = 2.0
MEET_S = 6.0  # for all who stand between
MET_S = 600.0  # an introduction serves so long; addresses and certificates change
UNKNOWN_S = 5.0  # whom a peer did not know, it is not asked for again so soon
ANSWERS_PER_S = 32.0  # to one peer, after a first ANSWERS_AT_ONCE
ANSWERS_AT_ONCE = 256
_ASKERS = 4096  # of whom it is remembered how much they asked

K = TypeVar("K")
log = logging.getLogger(__name__)


@wire_message
@dataclass(frozen=True, slots=True)
class Introduce:
    """How is this peer dialled?"""

    peer: PeerIdText


@wire_message
@dataclass(frozen=True, slots=True)
class Introduced:
    """As it says itself."""

    record: SignedRecord


@dataclass(frozen=True, slots=True)
class IntroductionsHealth:
    """Counts since the start."""

    met: int = 0  # strangers
    unmet: int = 0  # asked for in vain
    forged: int = 0  # answers that were another's record, or did not verify
    answered: int = 0
    refused: int = 0  # for somebody not known here, or to one who asks too much


class Introductions:
    """See the module. Registers its method with the transport."""

    def __init__(
        self,
        transport: Transport,
        contacts: ContactBook,
        record_book: RecordBook,
        table: MemberTable,
        clock: Callable[[], float],
    ) -> None:
        """`clock`: Unix seconds."""
        self.health = IntroductionsHealth()
        self._transport = transport
        self._contacts = contacts
        self._record_book = record_book
        self._table = table
        self._clock = clock
        self._met: OrderedDict[PeerId, float] = OrderedDict()  # until when it serves, in Unix time
        # Who did not know whom, and until when that one is not asked for it again.
        self._unknown: OrderedDict[tuple[PeerId, PeerId], float] = OrderedDict()
        self._asking: WeakValueDictionary[PeerId, asyncio.Lock] = WeakValueDictionary()
        self._asked: OrderedDict[PeerId, float] = OrderedDict()  # when an asker's answers are paid off
        transport.serve(METHOD, self._answer, frozenset(Role))

    async def meet(self, peer: PeerId, chain: Sequence[PeerId]) -> None:
        """So that `peer` can be dialled, if those between it and this one in `chain` can tell how."""
        me = self._transport.me
        if self._knows(peer) or peer not in chain or me not in chain:
            return
        here, there = chain.index(me), chain.index(peer)
        way = chain[here : there + 1] if here < there else chain[there : here + 1][::-1]
        try:
            async with asyncio.timeout(MEET_S):
                for nearer, stranger in pairwise(way):
                    lock = self._asking.setdefault(stranger, asyncio.Lock())
                    async with lock:  # one question serves all who wait
                        asked = self._unknown.get((nearer, stranger), 0.0) > self._clock()
                        if nearer != me and not asked and not self._knows(stranger):
                            await self._ask(nearer, stranger)
        except TimeoutError:
            log.info("nobody introduced %s within %g s", peer, MEET_S)

    def take(self, peer: PeerId, signed: SignedRecord) -> None:
        """A stranger's record that came along with its name. Raises RecordInvalid, AccessError."""
        if self._knows(peer):
            return
        try:
            self._admit(peer, signed)
        except (ProtocolViolation, AccessError):
            self._count(unmet=1, forged=1)
            raise

    def _admit(self, peer: PeerId, signed: SignedRecord) -> None:
        if (named := decoded(signed).peer) != peer:
            raise RecordInvalid(f"the record of {named} came where {peer}'s was due")
        now, record = self._clock(), self._record_book.get(peer)
        if record is None or not _serves(record, now):  # else what came may well be older
            record = self._record_book.admit(signed, now)
        self._contacts.learn(record.contact())
        self._count(met=1)
        _note(self._met, peer, now + MET_S)

    def _knows(self, peer: PeerId) -> bool:
        now = self._clock()
        known = peer == self._transport.me or self._table.get(peer) is not None
        known = known or (not self._table.sampled and self._contacts.get(peer) is not None)
        return known or self._met.get(peer, 0.0) > now

    async def _ask(self, other: PeerId, peer: PeerId) -> None:
        try:
            reply = await call(self._transport, other, METHOD, Introduce(peer), Introduced, timeout_s=ASK_S)
            self._admit(peer, reply.header.record)
        except ShoalError as error:
            forged = isinstance(error, ProtocolViolation | AccessError)
            self._count(unmet=1, forged=int(forged))
            _note(self._unknown, (other, peer), self._clock() + UNKNOWN_S)
            log.info("%s did not introduce %s: %s", other, peer, error)

    async def _answer(self, stream: Stream) -> None:
        asker, now = stream.remote.peer, self._clock()
        wanted = (await stream.receive(Introduce)).header.peer
        paid_s = max(self._asked.get(asker, 0.0), now) + 1.0 / ANSWERS_PER_S
        if paid_s > now + ANSWERS_AT_ONCE / ANSWERS_PER_S:
            self._count(refused=1)
            raise Busy(f"{asker} asks for too many introductions", 1.0)
        _note(self._asked, asker, paid_s, _ASKERS)
        record, signed = self._record_book.get(wanted), self._record_book.signed(wanted)
        if record is None or signed is None or not _serves(record, now):
            self._count(refused=1)
            raise NotHere(f"{wanted[:64]} is not known here")
        self._count(answered=1)
        await stream.send(Introduced(signed))

    def _count(self, **more: int) -> None:
        counts = {name: getattr(self.health, name) + count for name, count in more.items()}
        self.health = replace(self.health, **counts)


def _serves(record: PeerRecord, now: float) -> bool:
    return record.issued_unix_s + record.ttl_s > now


def _note(held: OrderedDict[K, float], key: K, until: float, most: int = limits.RECORDS_HELD) -> None:
    held[key] = until
    held.move_to_end(key)
    if len(held) > most:
        held.popitem(last=False)
