"""Roster: the records of this peer and of others, between directory, neighbours and table; part of `Members`.

The own record is signed anew when it changes and at a third of its life, and published; those of others are
looked up, verified, put in order and entered: all of a small swarm, of a large one those that concern this
peer (`circle`) and what helps a newcomer to choose. What the directory does not bring, neighbours do:
`learn` takes records from anywhere. A failing directory is counted and reported, and stops nobody.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from blake3 import blake3

from shoal.dht.beats import RosterEntry
from shoal.dht.buckets import LOOK_RECORDS
from shoal.dht.circle import Circle
from shoal.dht.directory import Directory, PeerRecord, SignedRecord
from shoal.dht.records import RecordBook, decoded, sign_record
from shoal.dht.table import MemberTable, says_something_new
from shoal.protocol import limits
from shoal.protocol.admission import Membership
from shoal.protocol.contacts import ContactBook
from shoal.protocol.errors import AccessError, ProtocolViolation, ShoalError
from shoal.protocol.identity import PeerId

REFRESH_S = 5.0  # between two lookups; the first ones come quicker
FIRST_REFRESH_S = 0.2
NEWCOMERS_LOOKS = 4  # in the first second of a process they show all stages: it may have to choose one
DIRECTORY_CALL_S = 15.0
LARGE_SWARM_TTL_S = 60.0  # in a large swarm records live longer: gossip of renewals grows with its square
ASK_AGAIN_S = 2.0  # a record asked of one neighbour is asked of another after this long

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RosterHealth:
    """How the spreading of records fares. Texts are of the last case, empty when all is well."""

    lookups: int = 0
    lookup_failures: int = 0
    lookup_error: str = ""
    publishes: int = 0
    publish_failures: int = 0
    publish_error: str = ""
    refused: int = 0  # records that did not verify
    refusal: str = ""
    twin: str = ""  # another process seen under this peer's id


class Roster:
    """See the module. `renewed` is called when the own record changed, `admitted` when another's did."""

    def __init__(
        self,
        *,
        me: PeerId,
        directory: Directory,
        membership: Membership,
        contacts: ContactBook,
        record_book: RecordBook,
        table: MemberTable,
        make_record: Callable[[], PeerRecord],
        clock: Callable[[], float],
        rng: random.Random,
        neighbour_limit: int,
        circle: Circle,
        renewed: Callable[[], None],
        admitted: Callable[[], None],
    ) -> None:
        self.health = RosterHealth()
        self._me = me
        self._directory = directory
        self._membership = membership
        self._contacts = contacts
        self._record_book = record_book
        self._table = table
        self._make_record = make_record
        self._clock = clock
        self._rng = rng
        self._neighbour_limit = neighbour_limit
        self._circle = circle
        self._renewed = renewed
        self._admitted = admitted
        self._sequence = 0
        self._looked_up = 0
        self._publish = asyncio.Event()
        self._seen: OrderedDict[bytes, None] = OrderedDict()  # digests of records already looked at
        self._asked: OrderedDict[PeerId, float] = OrderedDict()
        self.record, self.signed = self._sign()

    # --- the own record

    def renew(self, only_news: bool = False) -> None:
        """Sign the own record anew; `only_news`: if it says something new."""
        if only_news and not says_something_new(self.record, self._make_record()):
            return
        self.record, self.signed = self._sign()
        self._publish.set()
        self._renewed()

    async def keep_published(self) -> None:
        """For ever: spread the own record when it changes, and renew it at a third of its life."""
        failures = 0
        while True:
            self._publish.clear()
            expires_unix_s = self.record.issued_unix_s + self.record.ttl_s
            error = await self._call(self._directory.publish(self.signed, expires_unix_s))
            self.health = replace(
                self.health,
                publishes=self.health.publishes + 1,
                publish_failures=self.health.publish_failures + bool(error),
                publish_error=error,
            )
            failures = failures + 1 if error else 0
            wait_s = self.record.ttl_s / 3
            if failures:
                wait_s = min(wait_s, 2.0 ** min(failures, 4))
            try:
                async with asyncio.timeout(wait_s * self._rng.uniform(0.8, 1.0)):
                    await self._publish.wait()
            except TimeoutError:
                self.renew()

    def _sign(self) -> tuple[PeerRecord, SignedRecord]:
        self._sequence += 1
        record = self._make_record()
        crowded = len(self._table) >= self._neighbour_limit
        record = replace(
            record,
            sequence=self._sequence,
            issued_unix_s=self._clock(),
            ttl_s=max(record.ttl_s, LARGE_SWARM_TTL_S) if crowded else record.ttl_s,
        )
        return record, sign_record(record, self._membership.key, self._membership.run_id)

    # --- the records of others

    async def keep_looking(self) -> None:
        """For ever: what does the directory know?"""
        wait_s = FIRST_REFRESH_S
        while True:
            error = await self._call(self._look())
            self.health = replace(
                self.health,
                lookups=self.health.lookups + 1,
                lookup_failures=self.health.lookup_failures + bool(error),
                lookup_error=error,
            )
            self._record_book.live(self._clock())  # lets it forget the old
            await asyncio.sleep(wait_s * self._rng.uniform(0.8, 1.0))
            wait_s = min(wait_s * 1.5, REFRESH_S * max(1.0, self._looked_up / LOOK_RECORDS))

    async def learn(self, records: tuple[SignedRecord, ...], source: str) -> None:
        """Verify records and take in the good ones; a new one takes up to a millisecond."""
        for signed in records:
            digest = _digest(signed)
            if digest in self._seen:
                continue
            self._seen[digest] = None
            if len(self._seen) > limits.RECORDS_HELD:
                self._seen.popitem(last=False)
            self._admit(signed, source)
            await asyncio.sleep(0)

    def lacking(self, entries: tuple[RosterEntry, ...], now: float) -> list[PeerId]:
        """Which of the offered records to ask for: newer ones that nobody was asked for just now."""
        found = []
        for offered in entries:
            held = self._table.get(offered.peer)
            newer = held is None or (offered.incarnation, offered.sequence) > held.version
            due = now - self._asked.get(offered.peer, -ASK_AGAIN_S) >= ASK_AGAIN_S
            if newer and due and offered.peer != self._me:
                self._asked[offered.peer] = now
                self._asked.move_to_end(offered.peer)
                found.append(offered.peer)
        while len(self._asked) > limits.RECORDS_HELD:
            self._asked.popitem(last=False)
        return found

    def unwelcome(self) -> list[tuple[PeerId, str]]:
        """Peers of the table that were revoked or whose certificate expired, each with the reason."""
        revocations, wall_s = self._membership.revocations, self._clock()
        found = []
        for peer in self._table:
            entry = self._table.get(peer)
            if entry is not None and revocations.is_revoked(entry.owner):
                found.append((peer, f"revoked by list {revocations.version}"))
            elif entry is not None and entry.owner.not_after <= wall_s:
                found.append((peer, "its certificate expired"))
        return found

    async def _look(self) -> None:
        newcomer = self.health.lookups < NEWCOMERS_LOOKS
        sweeps = bool(self._circle.sizes) and self._circle.keeps_all
        found = await self._directory.lookup(self.record.stages, widely=newcomer or sweeps)
        self._looked_up = 0 if sweeps else len(found)
        self._circle.take_sizes(self._directory.sizes())
        if not (newcomer or self._circle.keeps_all):
            unseen = (signed for signed in found if _digest(signed) not in self._seen)
            found = tuple(self._circle.of(unseen, self.record.stages))
        await self.learn(found, "the directory")

    def _admit(self, signed: SignedRecord, source: str) -> None:
        """One record into book, table and contacts, if it is newer and verifies."""
        try:
            claimed = decoded(signed)
            held = self._table.get(claimed.peer)
            version = (claimed.incarnation, claimed.sequence)
            if held is not None and version <= held.version:
                return
            if claimed.peer == self._me and claimed.incarnation <= self.record.incarnation:
                return
            record = self._record_book.admit(signed, self._clock())
            owner = self._membership.verify(record.chain)
        except (ProtocolViolation, AccessError) as error:
            refusal = f"from {source}: {error}"
            self.health = replace(self.health, refused=self.health.refused + 1, refusal=refusal)
            log.info("record refused", extra={"source": source, "error": str(error)})
            return
        if record.peer == self._me:
            twin = f"a newer process runs under this peer's id at {', '.join(record.addresses)}"
            self.health = replace(self.health, twin=twin)
            log.warning("another process uses this peer's key", extra={"addresses": record.addresses})
            return
        now = asyncio.get_running_loop().time()
        age_s = self._clock() - record.issued_unix_s
        if self._table.get(record.peer) is None and not self._circle.has_room(owner):
            return
        watch = len(self._table) < self._neighbour_limit
        if self._table.admit(record, signed, owner, age_s=age_s, watch=watch, now=now):
            self._contacts.learn(record.contact())
            self._admitted()

    async def _call(self, work: Coroutine[Any, Any, None]) -> str:
        """What went wrong in a call of the directory, empty if nothing did."""
        try:
            async with asyncio.timeout(DIRECTORY_CALL_S):
                await work
        except TimeoutError:
            return f"no answer within {DIRECTORY_CALL_S:g} s"
        except ShoalError as error:
            return f"{type(error).__name__}: {error}"
        return ""


def _digest(signed: SignedRecord) -> bytes:
    return blake3(signed.signature + signed.record).digest()
