"""Members: who is in the swarm and alive. The one place that pipeline, rounds and status ask.

It merges what the directory spreads (records) with what neighbours say on heartbeat streams, which are
the truth. After joining it lives without the directory: neighbours pass records and revocations on.
Its parts: `table` (state), `liveness` and `neighbours` (policies), `neighbourhood` and `link` (streams).
The daemon makes one, starts transport and directory, then enters it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Self

from blake3 import blake3

from shoal.dht.beats import METHOD, Beat, RosterEntry
from shoal.dht.directory import Directory, PeerRecord, SignedRecord
from shoal.dht.neighbourhood import Neighbourhood
from shoal.dht.neighbours import SMALL_SWARM, neighbours
from shoal.dht.records import RecordBook, sign_record
from shoal.dht.table import Event, MemberTable, says_something_new
from shoal.dht.view import Member, SwarmView
from shoal.protocol import limits
from shoal.protocol.admission import Membership
from shoal.protocol.contacts import ContactBook
from shoal.protocol.errors import AccessError, Busy, NetworkError, ProtocolViolation, ShoalError
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Stream, Transport
from shoal.protocol.wire import decode

REFRESH_S = 5.0  # between two lookups; the first ones come quicker
FIRST_REFRESH_S = 0.2
DIRECTORY_CALL_S = 15.0
LARGE_SWARM_TTL_S = (
    60.0  # records of a large swarm live longer, since gossip of renewals grows with its square
)
ANNOUNCE_S = 0.2  # at least, between two rounds of beats for `changed_now`
ASK_AGAIN_S = 2.0  # a record asked of one neighbour is asked of another after this long
OWN_PAUSE_S = 1.0  # when our own loop was late by more, others are not to blame for silence
SOUGHT = 32  # gone peers that are still dialled now and then

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MembersHealth:
    """How the membership itself fares; shown in status."""

    known: int
    streams: int
    lookups: int
    lookup_failures: int
    lookup_error: str  # of the last lookup; empty if it succeeded
    publishes: int
    publish_failures: int
    publish_error: str
    records_refused: int
    refusal: str  # the last
    failed_dials: int
    dial_error: str  # the last
    twin: str  # another process seen under this peer's id


@dataclass(frozen=True, slots=True)
class _Own:
    record: PeerRecord
    signed: SignedRecord


class Members:
    """Table and heartbeats of one peer. Use as `async with members:` or `start` and `close`."""

    def __init__(
        self,
        *,
        transport: Transport,
        directory: Directory,
        membership: Membership,
        contacts: ContactBook,
        record_book: RecordBook,
        make_record: Callable[[], PeerRecord],
        make_beat: Callable[[], Beat],
        clock: Callable[[], float],
        rng: random.Random,
        heartbeat_s: float = 1.0,
        neighbour_limit: int = SMALL_SWARM,
    ) -> None:
        """Registers its method with the transport, so make it before the transport starts.

        `make_record` describes this peer now (sequence, time of issue and a longer ttl are filled in
        here), `make_beat` its progress; both are called often and must be cheap. `clock`: Unix seconds.
        """
        self.me = transport.me
        self.rng = rng
        self.heartbeat_s = heartbeat_s
        self.revocations = membership.revocations
        self.table = MemberTable(self._tell, self._view_changed)
        self._transport = transport
        self._directory = directory
        self._membership = membership
        self._contacts = contacts
        self._record_book = record_book
        self._make_record = make_record
        self._make_beat = make_beat
        self._clock = clock
        self._neighbour_limit = neighbour_limit
        self._neighbourhood = Neighbourhood(self, transport)
        self._listeners: list[Callable[[Event], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._own: _Own | None = None
        self._sequence = 0
        self._leaving = False
        self._view: SwarmView | None = None
        self._changed = asyncio.Event()
        self._choose = asyncio.Event()
        self._publish = asyncio.Event()
        self._judge = asyncio.Event()
        self._announcement: asyncio.TimerHandle | None = None
        self._announced_s = -ANNOUNCE_S
        self._seen: OrderedDict[bytes, None] = OrderedDict()  # digests of records already looked at
        self._asked: OrderedDict[PeerId, float] = OrderedDict()
        self._lookups = self._lookup_failures = self._publishes = self._publish_failures = 0
        self._lookup_error = self._publish_error = self._refusal = self._twin = ""
        self._records_refused = 0
        transport.serve(METHOD, self._answer, frozenset(Role))

    # --- life

    async def start(self) -> None:
        """Begin to publish, look up, beat and judge."""
        self._renew_own()
        self.revocations.changed.append(self._revocations_changed)
        self._membership.renewed.append(self.changed_now)
        for name, work in (
            ("publish", self._keep_published()),
            ("look up", self._keep_looking()),
            ("judge", self._keep_judging()),
            ("choose neighbours", self._keep_choosing()),
        ):
            self._spawn(work, f"members: {name}")

    async def close(self) -> None:
        """Stop everything at once; neighbours see their streams break. `leave` first for a clean farewell."""
        if self._own is None:
            return
        self._own = None
        self.revocations.changed.remove(self._revocations_changed)
        self._membership.renewed.remove(self.changed_now)
        if self._announcement is not None:
            self._announcement.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._neighbourhood.close()

    async def leave(self, reason: str = "left", within_s: float = 2.0) -> None:
        """Say goodbye to all neighbours, so that nobody waits for this peer; then `close`."""
        self._leaving = True
        await self._neighbourhood.say_goodbye(reason, within_s)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- what others ask

    def view(self) -> SwarmView:
        """The swarm now, this peer included."""
        now = self._now()
        if self._view is None:
            members = [*self.table.members(), self._myself()]
            members.sort(key=lambda member: member.peer)
            self._view = SwarmView(self.me, now, tuple(members))
        elif self._view.now_s != now:
            self._view = replace(self._view, now_s=now)
        return self._view

    async def wait_for(self, predicate: Callable[[SwarmView], bool], timeout_s: float) -> SwarmView:
        """The first view that satisfies `predicate`. Raises NetworkError after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not predicate(view := self.view()):
                    await self.changed()
                return view
        except TimeoutError:
            here = len(self.view().here())
            raise NetworkError(
                f"the swarm did not come to the awaited state within {timeout_s:g} s; {here} peers are here"
            ) from None

    async def changed(self) -> None:
        """Returns after the next change of the view, beats included."""
        await self._changed.wait()

    def on_event(self, listener: Callable[[Event], None]) -> None:
        """`listener` is called, from the loop, for every event from now on."""
        self._listeners.append(listener)

    def suspect(self, peer: PeerId, reason: str) -> None:
        """A call to this peer failed: spare it, and find out whether it is there."""
        self.table.failed(peer, reason, self._now())
        if self.table.get(peer) is not None:
            self._neighbourhood.look_into(peer)

    def changed_now(self) -> None:
        """This peer's record or progress changed in a way that others should not learn a second later."""
        if self._own is None:
            return
        if says_something_new(self._own.record, self._make_record()):
            self._renew_own()
        self._view_changed()
        self._choose.set()
        if self._announcement is None:
            due_s = max(self._now(), self._announced_s + ANNOUNCE_S)
            self._announcement = asyncio.get_running_loop().call_at(due_s, self._announce)

    def health(self) -> MembersHealth:
        return MembersHealth(
            known=len(self.table),
            streams=len(self._neighbourhood.links()),
            lookups=self._lookups,
            lookup_failures=self._lookup_failures,
            lookup_error=self._lookup_error,
            publishes=self._publishes,
            publish_failures=self._publish_failures,
            publish_error=self._publish_error,
            records_refused=self._records_refused,
            refusal=self._refusal,
            failed_dials=self._neighbourhood.failed_dials,
            dial_error=self._neighbourhood.last_failure,
            twin=self._twin,
        )

    # --- what links ask (`link.Home`)

    def own_record(self) -> tuple[SignedRecord, int, int]:
        own = self._running()
        return own.signed, own.record.incarnation, own.record.sequence

    def own_beat(self) -> Beat:
        own = self._running()
        beat = self._make_beat()
        self._view = None
        return replace(
            beat,
            incarnation=own.record.incarnation,
            record_sequence=own.record.sequence,
            revocation_version=self.revocations.version,
            draining=beat.draining or self._leaving,
        )

    async def learn(self, records: tuple[SignedRecord, ...], source: str) -> None:
        """Verify records and take in the good ones; each new one costs up to a millisecond."""
        for signed in records:
            digest = blake3(signed.signature + signed.record).digest()
            if digest in self._seen:
                continue
            self._seen[digest] = None
            if len(self._seen) > limits.RECORDS_HELD:
                self._seen.popitem(last=False)
            self._admit(signed, source)
            await asyncio.sleep(0)

    def lacking(self, entries: tuple[RosterEntry, ...]) -> list[PeerId]:
        found = []
        now = self._now()
        for offered in entries:
            held = self.table.get(offered.peer)
            version = (held.record.incarnation, held.record.sequence) if held else (-1, -1)
            newer = (offered.incarnation, offered.sequence) > version and offered.peer != self.me
            if newer and now - self._asked.get(offered.peer, -ASK_AGAIN_S) >= ASK_AGAIN_S:
                self._asked[offered.peer] = now
                self._asked.move_to_end(offered.peer)
                found.append(offered.peer)
        while len(self._asked) > limits.RECORDS_HELD:
            self._asked.popitem(last=False)
        return found

    # --- own record

    def _renew_own(self) -> None:
        self._sequence += 1
        record = self._make_record()
        crowded = len(self.table) >= self._neighbour_limit
        record = replace(
            record,
            sequence=self._sequence,
            issued_unix_s=self._clock(),
            ttl_s=max(record.ttl_s, LARGE_SWARM_TTL_S) if crowded else record.ttl_s,
        )
        self._own = _Own(record, sign_record(record, self._membership.key, self._membership.run_id))
        self._publish.set()
        for link in self._neighbourhood.links():
            link.nudge()

    def _announce(self) -> None:
        self._announcement = None
        self._announced_s = self._now()
        for link in self._neighbourhood.links():
            link.beat_now()

    async def _keep_published(self) -> None:
        """Spread the own record when it changes and at a third of its life; streams get it either way."""
        failures = 0
        while True:
            self._publish.clear()
            own = self._running()
            error = await self._directory_call(
                self._directory.publish(own.signed, own.record.issued_unix_s + own.record.ttl_s)
            )
            self._publishes += 1
            self._publish_failures += bool(error)
            self._publish_error = error
            failures = failures + 1 if error else 0
            wait_s = own.record.ttl_s / 3 if not error else min(2.0 ** min(failures, 4), own.record.ttl_s / 3)
            if not await self._waited(self._publish, wait_s * self.rng.uniform(0.8, 1.0)):
                self._renew_own()

    # --- others' records

    async def _keep_looking(self) -> None:
        wait_s = FIRST_REFRESH_S
        while True:
            found: list[SignedRecord] = []

            async def look(into: list[SignedRecord] = found) -> None:
                into.extend(await self._directory.lookup())

            error = await self._directory_call(look())
            self._lookups += 1
            self._lookup_failures += bool(error)
            self._lookup_error = error
            await self.learn(tuple(found), "the directory")
            self._sweep()
            await asyncio.sleep(wait_s * self.rng.uniform(0.8, 1.0))
            wait_s = min(wait_s * 1.5, REFRESH_S)

    async def _directory_call(self, work: Coroutine[Any, Any, None]) -> str:
        """What went wrong, empty if nothing; the directory's troubles stop nobody."""
        try:
            async with asyncio.timeout(DIRECTORY_CALL_S):
                await work
        except TimeoutError:
            return f"no answer within {DIRECTORY_CALL_S:g} s"
        except ShoalError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def _admit(self, signed: SignedRecord, source: str) -> None:
        """One record into book, table and contacts, if it is valid and newer."""
        now = self._now()
        try:
            claimed = decode(PeerRecord, signed.record)
            held = self.table.get(claimed.peer)
            if held and (claimed.incarnation, claimed.sequence) <= (
                held.record.incarnation,
                held.record.sequence,
            ):
                return
            if claimed.peer == self.me and claimed.incarnation == self._running().record.incarnation:
                return
            record = self._record_book.admit(signed, self._clock())
            owner = self._membership.verify(record.chain)
        except (ProtocolViolation, AccessError) as error:
            self._records_refused += 1
            self._refusal = f"from {source}: {error}"
            log.info("record refused", extra={"source": source, "error": str(error)})
            return
        if record.peer == self.me:
            self._meet_twin(record)
            return
        age_s = self._clock() - record.issued_unix_s
        watch = len(self.table) < self._neighbour_limit
        if self.table.admit(record, signed, owner, age_s=age_s, watch=watch, now=now):
            self._contacts.learn(record.contact())
            self._choose.set()
            self._judge.set()

    def _meet_twin(self, record: PeerRecord) -> None:
        """Our own id, another process. An older one is our own past; a newer one has copied the key."""
        if record.incarnation > self._running().record.incarnation:
            self._twin = f"a newer process runs under this id at {', '.join(record.addresses)}"
            log.warning("another process uses this peer's key", extra={"addresses": record.addresses})

    def _sweep(self) -> None:
        """Out with those whose certificate expired or was revoked; let the book forget the old."""
        wall_s = self._clock()
        self._record_book.live(wall_s)
        for peer in self.table:
            entry = self.table.get(peer)
            if entry is None:
                continue
            if self.revocations.is_revoked(entry.owner):
                self._shut_out(peer, f"revoked by list {self.revocations.version}")
            elif entry.owner.not_after <= wall_s:
                self._shut_out(peer, "its certificate expired")

    def _shut_out(self, peer: PeerId, reason: str) -> None:
        self._neighbourhood.drop(peer)
        self.table.remove(peer, reason)
        self._spawn(self._transport.disconnect(peer), f"disconnect {peer}")

    def _revocations_changed(self) -> None:
        self._sweep()
        self.changed_now()

    # --- neighbours and time

    async def _answer(self, stream: Stream) -> None:
        if self._own is None or self._leaving:
            raise Busy(f"{self.me} is starting or leaving", 1.0)
        await self._neighbourhood.answer(stream)

    async def _keep_choosing(self) -> None:
        while True:
            await self._choose.wait()
            self._choose.clear()
            if not self._leaving:
                chosen = neighbours(self.view(), self.me, self._neighbour_limit)
                self._neighbourhood.keep(chosen, self._sought() - chosen)
            crowded = len(self.table) > self._neighbour_limit
            await asyncio.sleep(0.5 if crowded else 0.02)

    def _sought(self) -> frozenset[PeerId]:
        """Gone peers worth dialling: those whose record is fresh first, then the latest gone."""
        now = self._now()
        gone = [
            (entry.record_until_s > now, entry.gone_s, peer)
            for peer in self.table
            if (entry := self.table.get(peer)) and entry.gone_s is not None and not entry.said_goodbye
        ]
        return frozenset(peer for _, _, peer in sorted(gone, reverse=True)[:SOUGHT])

    async def _keep_judging(self) -> None:
        """Wake when a verdict falls due; notice when it was this process that stood still."""
        while True:
            self._judge.clear()
            now = self._now()
            due_s = max(min(self.table.judge_due(now), now + OWN_PAUSE_S), now)
            if not await self._waited(self._judge, due_s - now):
                late_s = self._now() - due_s
                if late_s > OWN_PAUSE_S:
                    log.warning("this process stood still", extra={"pause_s": round(late_s, 3)})
                    self.table.excuse(late_s)

    def _myself(self) -> Member:
        own = self._running()
        record, beat = own.record, self.own_beat()
        return Member(
            peer=self.me,
            roles=self._membership.me.roles,
            token_id=self._membership.me.token_id,
            state="draining" if beat.draining else record.state,
            stages=record.stages,
            name=record.name,
            device=record.device,
            incarnation=record.incarnation,
            tokens_per_s=beat.tokens_per_s or record.tokens_per_s,
            reason="this peer",
            heard_s=self._now(),
            rtt_s=0.0,
            beat=beat,
        )

    # --- small things

    def _tell(self, event: Event) -> None:
        log.info("member %s", event.kind, extra={"peer": event.peer, "reason": event.reason})
        self._choose.set()
        for listener in self._listeners:
            asyncio.get_running_loop().call_soon(listener, event)

    def _view_changed(self) -> None:
        self._view = None
        self._changed.set()
        self._changed = asyncio.Event()

    def _present(self) -> _Own:
        if self._own is None:
            raise Busy(f"the membership of {self.me} is not running", 1.0)
        return self._own

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)

    @staticmethod
    async def _waited(event: asyncio.Event, wait_s: float) -> bool:
        """Whether the event came within `wait_s`."""
        try:
            async with asyncio.timeout(wait_s):
                await event.wait()
        except TimeoutError:
            return False
        return True

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
