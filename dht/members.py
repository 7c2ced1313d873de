"""Members: who is in the swarm and alive. The one place that pipeline, rounds and status ask.

It merges what the directory spreads (records) with what neighbours say on heartbeat streams, which are the
truth. After joining it lives without the directory: neighbours pass records and revocations on. In a large
swarm it knows those who concern it (`circle`). Its parts: `table` (state, brought up to date by `judging`),
`liveness`, `absence`, `neighbours` and `interest` (policies), `roster` (records), `own_beat`, `neighbourhood`
and `link` (streams), `introductions` (to those it does not know). The daemon makes one, starts transport and
directory, then enters it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from shoal.dht.absence import Absences
from shoal.dht.beats import METHOD, Beat, RosterEntry
from shoal.dht.circle import Circle
from shoal.dht.directory import Directory, PeerRecord, SignedRecord
from shoal.dht.interest import KNOWN, Known
from shoal.dht.introductions import Introductions, IntroductionsHealth
from shoal.dht.judging import keep_judging
from shoal.dht.neighbourhood import Neighbourhood
from shoal.dht.neighbours import SMALL_SWARM, neighbours
from shoal.dht.own_beat import OwnBeat
from shoal.dht.records import RecordBook
from shoal.dht.roster import Roster, RosterHealth
from shoal.dht.table import Entry, Event, MemberTable
from shoal.dht.view import SwarmView
from shoal.protocol.admission import Membership
from shoal.protocol.contacts import ContactBook
from shoal.protocol.errors import Busy, NetworkError
from shoal.protocol.identity import PeerId, Role
from shoal.protocol.transport import Stream, Transport

SOUGHT = 32  # gone peers that are still dialled now and then
CHOOSE_SMALL_S, CHOOSE_LARGE_S = 0.02, 0.5  # at least, between two choices of neighbours

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MembersHealth:
    """How the membership itself fares; shown in status."""

    known: int
    streams: int
    failed_dials: int
    dial_error: str  # the last
    roster: RosterHealth
    introductions: IntroductionsHealth
    crowded_out: int  # records that one token had too many of


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
        known: Known = KNOWN,
    ) -> None:
        """Registers its method with the transport, so make it before the transport starts.

        `make_record` describes this peer now (sequence, time of issue and, in a large swarm, a longer ttl
        are filled in here), `make_beat` its progress; both are called often and must be cheap. Neither is
        called before `start`. `clock`: Unix seconds.
        """
        self.me = transport.me
        self.rng = rng
        self.heartbeat_s = heartbeat_s
        self.revocations = membership.revocations
        self.amendments = membership.amendments
        self.table = MemberTable(self._tell, self._view_changed)
        self._transport = transport
        self._directory = directory
        self._membership = membership
        self._absences = Absences(membership.me.token_id)
        self._own = OwnBeat(
            membership, lambda: self._running().record, make_beat, self._announce, self._absences.told
        )
        self.neighbour_limit = neighbour_limit
        self._circle = Circle(membership.me, known, self.table)
        self._neighbourhood = Neighbourhood(self, transport)
        self._introductions = Introductions(transport, contacts, record_book, self.table, clock)
        self._choose = asyncio.Event()
        self._roster: Roster | None = None  # while running
        self._make_roster: Callable[[], Roster] = lambda: Roster(
            me=transport.me,
            directory=directory,
            membership=membership,
            contacts=contacts,
            record_book=record_book,
            table=self.table,
            make_record=lambda: replace(make_record(), service_s=make_beat().service_s),
            clock=clock,
            rng=rng,
            neighbour_limit=neighbour_limit,
            circle=self._circle,
            renewed=self._own_renewed,
            admitted=self._choose.set,
        )
        self._listeners: list[Callable[[Event], None]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._view: SwarmView | None = None
        self._viewed_s = 0.0
        self._changed: asyncio.Event | None = None  # while somebody waits for it
        transport.serve(METHOD, self._answer, frozenset(Role))
        transport.on_trouble = lambda peer, error: self.suspect(peer, str(error))

    # --- life

    async def start(self) -> None:
        """Begin to publish, look up, beat and judge."""
        self._roster = roster = self._make_roster()
        self._own.forget()
        self.revocations.changed.append(self._revocations_changed)
        self.amendments.changed.append(self.changed_now)
        self._membership.renewed.append(self.changed_now)
        self._spawn(roster.keep_published(), "members: publish")
        self._spawn(roster.keep_looking(), "members: look up")
        self._absences.begin(self._now())
        judging = keep_judging(
            self.table,
            self._circle,
            self._absences,
            self._directory.sizes,
            self._own.joining,
            self._shut_out_unwelcome,
        )
        self._spawn(judging, "members: judge")
        self._spawn(self._keep_choosing(), "members: choose neighbours")

    async def close(self) -> None:
        """Stop everything at once; neighbours see their streams break. `leave` first for a clean farewell."""
        if self._roster is None:
            return
        self.revocations.changed.remove(self._revocations_changed)
        self.amendments.changed.remove(self.changed_now)
        self._membership.renewed.remove(self.changed_now)
        self._own.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._neighbourhood.close()
        self._roster = None

    async def leave(self, reason: str = "left", within_s: float = 2.0) -> None:
        """Say goodbye to all neighbours, so that nobody waits for this peer; then `close`."""
        self._own.leaving = True
        self._own.forget()
        await self._neighbourhood.say_goodbye(reason, within_s)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- what others ask

    @property
    def running(self) -> bool:
        """Between `start` and `close`; only then there is a view."""
        return self._roster is not None

    @property
    def lookups(self) -> int:
        """How often the directory has told who is there, or that it cannot."""
        return self._roster.health.lookups if self._roster is not None else 0

    def view(self) -> SwarmView:
        """The swarm now, this peer included."""
        now = self._now()
        if self._view is None or now - self._viewed_s > self.heartbeat_s:
            self._viewed_s = now
            members = [*self.table.members(), self._own.member()]
            known = tuple(sorted(members, key=lambda member: member.peer))
            sizes = self._directory.sizes()
            sampled, absent_since_s = bool(self._circle.sizes), self._absences.since_s
            self._view = SwarmView(self.me, now, known, sizes, sampled, absent_since_s)
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
            raise NetworkError(
                f"the swarm did not come to the awaited state within {timeout_s:g} s; "
                f"{len(self.view().here())} peers are here"
            ) from None

    async def changed(self) -> None:
        """Returns after the next change of the view, beats included."""
        if self._changed is None:
            self._changed = asyncio.Event()
        await self._changed.wait()

    def on_event(self, listener: Callable[[Event], None]) -> None:
        """`listener` is called, from the loop, for every event from now on."""
        self._listeners.append(listener)

    def suspect(self, peer: PeerId, reason: str) -> None:
        """A call to this peer failed: spare it, and find out whether it is there."""
        entry = self.table.get(peer)
        if entry is not None and entry.gone_s is None:
            self.table.failed(peer, reason, self._now())
            self._neighbourhood.look_into(peer)

    async def meet(self, peer: PeerId, chain: Sequence[PeerId]) -> None:
        """Find out how to dial a peer that worked in one chain with this one; see `introductions`."""
        await self._introductions.meet(peer, chain)

    def introduced(self, peer: PeerId, signed: SignedRecord) -> None:
        """The same, from a record that came with its name. Raises RecordInvalid, AccessError."""
        self._introductions.take(peer, signed)

    def record_of(self, peer: PeerId) -> SignedRecord | None:
        """To introduce somebody with, if this peer knows it."""
        entry = self.table.get(peer)
        return entry.signed if entry is not None else None

    def changed_now(self) -> None:
        """This peer's record or progress changed in a way that others should not learn a second later."""
        if self._roster is None:
            return
        self._own.forget()
        self._roster.renew(only_news=True)
        self._view_changed()
        self._choose.set()
        self._own.announce_soon()

    def health(self) -> MembersHealth:
        return MembersHealth(
            known=len(self.table),
            streams=len(self._neighbourhood.links()),
            failed_dials=self._neighbourhood.failed_dials,
            dial_error=self._neighbourhood.last_failure,
            roster=self._roster.health if self._roster else RosterHealth(),
            introductions=self._introductions.health,
            crowded_out=self._circle.crowded_out,
        )

    # --- what links ask (`link.Home`)

    def own_record(self) -> tuple[SignedRecord, int, int]:
        roster = self._running()
        return roster.signed, roster.record.incarnation, roster.record.sequence

    def own_beat(self) -> Beat:
        return self._own.now()

    async def learn(self, records: tuple[SignedRecord, ...], source: str) -> None:
        await self._running().learn(records, source)

    def concerns(self, peer: PeerId, entry: Entry) -> bool:
        return self._circle.wants(peer, entry)

    def lacking(self, entries: tuple[RosterEntry, ...]) -> list[PeerId]:
        return self._running().lacking(entries, self._now())

    # --- what the parts report

    def _own_renewed(self) -> None:
        self._own.forget()
        self._view_changed()
        for link in self._neighbourhood.links():
            link.nudge()

    def _revocations_changed(self) -> None:
        self._shut_out_unwelcome()
        self.changed_now()

    def _tell(self, event: Event) -> None:
        log.info("member %s", event.kind, extra={"peer": event.peer, "reason": event.reason})
        self._choose.set()
        for listener in self._listeners:
            asyncio.get_running_loop().call_soon(listener, event)

    def _view_changed(self) -> None:
        self._view = None
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    # --- work

    async def _answer(self, stream: Stream) -> None:
        if self._roster is None or self._own.leaving:
            raise Busy(f"{self.me} is starting or leaving", 1.0)
        await self._neighbourhood.answer(stream)

    def _announce(self) -> None:
        for link in self._neighbourhood.links():
            link.beat_now()

    async def _keep_choosing(self) -> None:
        while True:
            await self._choose.wait()
            self._choose.clear()
            if not self._own.leaving:
                chosen = neighbours(self.view(), self.me, self.neighbour_limit)
                self._neighbourhood.keep(chosen, self._sought() - chosen)
            crowded = len(self.table) > self.neighbour_limit
            await asyncio.sleep(CHOOSE_LARGE_S if crowded else CHOOSE_SMALL_S)

    def _sought(self) -> frozenset[PeerId]:
        """Gone peers worth dialling: those whose record is fresh first, then the latest gone."""
        now = self._now()
        gone = [
            (entry.record_until_s > now, entry.gone_s, peer)
            for peer in self.table
            if (entry := self.table.get(peer)) and entry.gone_s is not None and not entry.said_goodbye
        ]
        return frozenset(peer for _, _, peer in sorted(gone, reverse=True)[:SOUGHT])

    def _shut_out_unwelcome(self) -> None:
        for peer, reason in self._running().unwelcome():
            self._neighbourhood.drop(peer)
            self.table.remove(peer, reason)
            self._spawn(self._transport.disconnect(peer), f"members: disconnect {peer}")

    # --- small things

    def _running(self) -> Roster:
        if self._roster is None:
            raise Busy(f"the membership of {self.me} is not running", 1.0)
        return self._roster

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed", task.get_name(), exc_info=error)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
