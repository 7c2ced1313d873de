"""The table behind `Members`: what is known of each peer, merged from records, streams and failed calls.

Plain state and rules, no I/O; every method takes the loop time. Whatever is learned is judged at once
(`liveness`), and each change of a peer's standing is told as an `Event`. Bounded: RECORDS_HELD peers, and
GONE_KEPT of those that went. Of a swarm known in part (`sampled`) a record that lapses says nothing, for
nobody need have passed on a newer one: such a peer is forgotten, and not called gone.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from shoal.dht.beats import Beat, RosterEntry
from shoal.dht.directory import PeerRecord, SignedRecord
from shoal.dht.liveness import Evidence, Liveness, Verdict, judge
from shoal.dht.view import Member
from shoal.protocol import limits
from shoal.protocol.identity import HOLDERS, PeerId, VerifiedPeer
from shoal.protocol.wire import changed

EventKind = Literal["joined", "suspect", "gone", "back", "left"]
GONE_KEPT = 256  # gone peers remembered, the latest
GONE_KEPT_S = 3600.0  # a partition may last; they are redialled ever more rarely
LIVED_DOWN_S = 30.0  # without a failed call, after which the earlier ones are forgotten
_GAP_SHARE = 0.2  # of a new measurement in the usual gap between finished work
_RTT_SHARE = 0.125  # of a new measurement in the smoothed round trip, as TCP does (RFC 6298)

_NEWS = ("incarnation", "state", "stages", "states", "name", "addresses", "chain", "device", "version")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """A peer's standing changed: joined (first alive, or restarted), suspect, gone, back (alive again), left
    (said goodbye, or was put out)."""

    kind: EventKind
    peer: PeerId
    reason: str


@dataclass(slots=True, eq=False)
class Entry:
    """What is known of one peer. `offer` is what others are told of its record."""

    record: PeerRecord
    offer: RosterEntry
    signed: SignedRecord
    owner: VerifiedPeer
    record_until_s: float
    verdict: Verdict
    beat: Beat | None = None
    heard_s: float | None = None
    watched_since_s: float | None = None
    streams: int = 0
    refused: bool = False
    said_goodbye: bool = False
    failed_calls: int = 0
    failed_s: float = -math.inf
    failed_reason: str = ""
    worked_s: float = -math.inf
    work_gap_s: float = 0.0
    rtt_s: float | None = None
    gone_s: float | None = None
    joined: bool = False
    learned: int = 0  # rises with every change worth telling others
    member: Member | None = field(default=None, repr=False)  # cached picture

    @property
    def version(self) -> tuple[int, int]:
        """A newer record has a higher one."""
        return self.offer.incarnation, self.offer.sequence

    def lapsed(self, now: float) -> bool:
        """Only its record spoke for it, and does no more."""
        return self.watched_since_s is None and self.gone_s is None and now >= self.record_until_s

    def evidence(self) -> Evidence:
        return Evidence(
            record_until_s=self.record_until_s,
            watched_since_s=self.watched_since_s,
            known_alive=self.joined,
            heard_s=self.heard_s,
            stream_open=self.streams > 0,
            refused=self.refused,
            said_goodbye=self.said_goodbye,
            failed_calls=self.failed_calls,
            failed_s=self.failed_s,
            failed_reason=self.failed_reason,
            backlog_s=self.beat.backlog_s if self.beat else 0.0,
            worked_s=self.worked_s,
            work_gap_s=self.work_gap_s,
        )


class MemberTable:
    """Everybody but this peer itself. `tell` hears every event, `changed` every change of the picture."""

    def __init__(self, tell: Callable[[Event], None], changed: Callable[[], None]) -> None:
        self.sampled = False  # the swarm is known in part
        self._tell = tell
        self._changed = changed
        self._entries: dict[PeerId, Entry] = {}
        self._learned: OrderedDict[PeerId, int] = OrderedDict()  # newest last
        self._learned_count = 0
        self._departed: OrderedDict[PeerId, int] = OrderedDict()  # incarnation that said goodbye

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[PeerId]:
        return iter(tuple(self._entries))

    def get(self, peer: PeerId) -> Entry | None:
        return self._entries.get(peer)

    # --- records

    def admit(
        self,
        record: PeerRecord,
        signed: SignedRecord,
        owner: VerifiedPeer,
        *,
        age_s: float,
        watch: bool,
        now: float,
    ) -> bool:
        """Take a verified record. False: it is not newer than what is held, or of one that has left.

        `age_s`: since it was issued, by the wall clock. `watch`: a newcomer will be a neighbour, so it
        counts as alive only when heard. Only news, and renewals of copies that are half
        over, are worth telling others: that halves what gossip costs.
        """
        peer = record.peer
        held = self._entries.get(peer)
        if record.incarnation <= self._departed.get(peer, -1):
            return False
        if held is not None and (record.incarnation, record.sequence) <= held.version:
            return False
        offer = RosterEntry(peer, record.incarnation, record.sequence)
        until_s = now + record.ttl_s - min(max(age_s, 0.0), record.ttl_s)
        news = (
            held is None
            or says_something_new(held.record, record)
            or held.record_until_s - now < record.ttl_s / 2
        )
        if held is None:
            if len(self._entries) >= limits.RECORDS_HELD:
                log.warning("member table is full", extra={"peer": peer, "held": len(self._entries)})
                return False
            held = Entry(record, offer, signed, owner, until_s, Verdict(Liveness.SUSPECT, "new"))
            held.watched_since_s = now if watch else None
            self._entries[peer] = held
        elif record.incarnation > held.record.incarnation:
            self._restarted(held, now)
        held.record, held.offer, held.signed, held.owner = record, offer, signed, owner
        held.record_until_s = max(held.record_until_s, until_s)
        if news:
            self._learned_count += 1
            self._learned[peer] = held.learned = self._learned_count
            self._learned.move_to_end(peer)
        self.judge(peer, now)
        return True

    def learned_after(self, count: int, most: int) -> tuple[list[Entry], int]:
        """Up to `most` entries learned after `count`, oldest first, and the count to continue from."""
        found: list[Entry] = []
        for peer, learned in reversed(self._learned.items()):
            if learned <= count:
                break
            found.append(self._entries[peer])
        found = found[::-1][:most]
        return found, found[-1].learned if found else count

    def some(self, start: int, most: int) -> list[Entry]:
        """Up to `most` entries from place `start` on, going round; for offers that repair what got lost."""
        size = len(self._entries)
        first = start % size if size else 0
        return list(islice(self._entries.values(), first, first + most))

    # --- what streams tell

    def watch(self, peer: PeerId, watched: bool, now: float) -> None:
        """From now on beats are (not) due from this peer."""
        entry = self._entries.get(peer)
        if entry and (entry.watched_since_s is not None) != watched:
            entry.watched_since_s = now if watched else None
            self.judge(peer, now)

    def unwatch_living(self, peer: PeerId, now: float) -> None:
        """Beats are no longer due. A gone peer stays gone: a fresh record does not outweigh a dead stream."""
        entry = self._entries.get(peer)
        if entry and entry.gone_s is None:
            self.watch(peer, False, now)

    def streams(self, peer: PeerId, count: int, now: float) -> None:
        """How many streams with this peer carry beats."""
        entry = self._entries.get(peer)
        if entry and entry.streams != count:
            entry.streams = count
            self.judge(peer, now)

    def refused(self, peer: PeerId, now: float) -> None:
        """A dial was refused at once, by the machine, not by silence."""
        if entry := self._entries.get(peer):
            entry.refused = True
            self.judge(peer, now)

    def beat(self, peer: PeerId, beat: Beat, now: float, rtt_s: float | None) -> None:
        """A beat of the incarnation that the table knows; others are dropped."""
        entry = self._entries.get(peer)
        if entry is None or beat.incarnation != entry.record.incarnation or entry.said_goodbye:
            return
        if not entry.owner.roles & HOLDERS:  # what it says of stages is none of its business
            beat = changed(beat, stages=(), guards=(), streams=(), spare_bytes=0, room=0, absences=())
        worked = entry.beat is None or beat.finished_work > entry.beat.finished_work
        if worked and entry.beat is not None and entry.beat.backlog_s > 0.0:
            gap_s = (now - entry.worked_s) / (beat.finished_work - entry.beat.finished_work)
            entry.work_gap_s += _GAP_SHARE * (gap_s - entry.work_gap_s)
        if worked or beat.backlog_s <= 0.0:
            entry.worked_s = now
        if rtt_s is not None:
            entry.rtt_s = rtt_s if entry.rtt_s is None else entry.rtt_s + _RTT_SHARE * (rtt_s - entry.rtt_s)
        if now - entry.failed_s > LIVED_DOWN_S:
            entry.failed_calls = 0
        if entry.watched_since_s is None and entry.streams > 0:
            entry.watched_since_s = now  # whoever sends beats is expected to go on
        entry.beat, entry.heard_s, entry.refused = beat, now, False
        self.judge(peer, now)

    def failed(self, peer: PeerId, reason: str, now: float) -> None:
        """Somebody's call to this peer failed."""
        if entry := self._entries.get(peer):
            entry.failed_calls += 1
            entry.failed_s, entry.failed_reason = now, reason[:128]
            self.judge(peer, now)

    def goodbye(self, peer: PeerId, incarnation: int, reason: str, now: float) -> None:
        """It leaves for good. Its entry stays a while, gone and departed; older records of it are refused."""
        entry = self._entries.get(peer)
        if entry is None or incarnation != entry.record.incarnation or entry.said_goodbye:
            return
        entry.said_goodbye = True
        self._departed[peer] = incarnation
        if len(self._departed) > limits.RECORDS_HELD:
            self._departed.popitem(last=False)
        entry.verdict = judge(now, entry.evidence())
        entry.gone_s, entry.member = now, None
        if entry.joined:
            self._tell(Event("left", peer, reason))
        self._changed()

    def remove(self, peer: PeerId, reason: str) -> None:
        """Out of the table: revoked, or its certificate expired."""
        entry = self._entries.get(peer)
        if entry is None:
            return
        self.forget(peer)
        if entry.joined and not entry.said_goodbye:
            self._tell(Event("left", peer, reason))

    def forget(self, peer: PeerId) -> None:
        """Out of the table, and nothing is said of it: it may well be alive."""
        del self._entries[peer]
        self._learned.pop(peer, None)
        self._changed()

    # --- time

    def judge(self, peer: PeerId, now: float) -> None:
        """Bring one peer's verdict up to date and tell what changed."""
        entry = self._entries.get(peer)
        if entry is None or entry.said_goodbye:
            return
        if self.sampled and entry.lapsed(now):
            self.forget(peer)
            return
        before, entry.verdict = entry.verdict, judge(now, entry.evidence())
        entry.member = None
        was, now_is = before.liveness, entry.verdict.liveness
        if now_is is not was or not entry.joined:
            entry.gone_s = (entry.gone_s or now) if now_is is Liveness.GONE else None
            self._tell_standing(entry, was, now_is)
        self._changed()

    def judge_due(self, now: float) -> float:
        """Judge all whose time has come, forget the long gone; returns when to come again."""
        for peer, entry in tuple(self._entries.items()):
            if entry.verdict.until_s <= now:
                self.judge(peer, now)
        self._forget(now)
        return min((entry.verdict.until_s for entry in self._entries.values()), default=math.inf)

    def excuse(self, pause_s: float) -> None:
        """This process itself stood still for a while: nobody was silent because of that."""
        for entry in self._entries.values():
            entry.record_until_s += pause_s
            entry.worked_s += pause_s
            if entry.heard_s is not None:
                entry.heard_s += pause_s
            if entry.watched_since_s is not None:
                entry.watched_since_s += pause_s

    def _forget(self, now: float) -> None:
        gone = [(e.gone_s, peer) for peer, e in self._entries.items() if e.gone_s is not None]
        gone.sort(reverse=True)
        for place, (gone_s, peer) in enumerate(gone):
            entry = self._entries[peer]
            ghost = not entry.joined and now > entry.record_until_s
            if ghost or place >= GONE_KEPT or now - gone_s > GONE_KEPT_S:
                self.forget(peer)

    def _tell_standing(self, entry: Entry, was: Liveness, now_is: Liveness) -> None:
        kind: EventKind
        match now_is:
            case Liveness.ALIVE:
                kind = "back" if entry.joined else "joined"
                entry.joined = True
            case Liveness.SUSPECT:
                kind = "suspect"
            case Liveness.GONE:
                kind = "gone"
        if entry.joined and (now_is is not was or kind == "joined"):
            self._tell(Event(kind, entry.record.peer, entry.verdict.reason))

    def _restarted(self, entry: Entry, now: float) -> None:
        """A new process under the old id: nothing measured of the old one holds."""
        if entry.joined and entry.gone_s is None:
            self._tell(Event("gone", entry.record.peer, "it restarted"))
        entry.joined = entry.refused = entry.said_goodbye = False
        entry.beat = entry.heard_s = entry.rtt_s = None
        entry.failed_calls, entry.failed_s = 0, -math.inf
        entry.worked_s, entry.work_gap_s = -math.inf, 0.0
        if entry.watched_since_s is not None:
            entry.watched_since_s = now

    # --- the picture

    def members(self) -> list[Member]:
        """All entries as frozen members, unsorted."""
        return [entry.member or _picture(entry) for entry in self._entries.values()]


def _picture(entry: Entry) -> Member:
    record, beat = entry.record, entry.beat
    entry.member = Member(
        peer=record.peer,
        roles=entry.owner.roles,
        token_id=entry.owner.token_id,
        state="draining" if beat and beat.draining else record.state,
        stages=record.stages,
        states=() if beat and beat.draining else record.states,
        name=record.name,
        device=record.device,
        incarnation=record.incarnation,
        tokens_per_s=(beat.tokens_per_s if beat else 0.0) or record.tokens_per_s,
        service_s=(beat.service_s if beat else 0.0) or record.service_s,
        liveness=entry.verdict.liveness,
        reason=entry.verdict.reason,
        departed=entry.verdict.liveness is Liveness.GONE and (entry.said_goodbye or entry.refused),
        gone_s=entry.gone_s,
        heard_s=entry.heard_s,
        rtt_s=entry.rtt_s,
        beat=beat,
    )
    return entry.member


def says_something_new(old: PeerRecord, new: PeerRecord) -> bool:
    """Did anything change but the sequence, the times and a measured rate?"""
    return any(getattr(old, name) != getattr(new, name) for name in _NEWS)
