"""Leader: conducts one round of a group, or finishes the one that a lost leader left.

PREPARE fixes height, ballot and roster; the answers tell what there is to contribute and what is undecided.
Highest first, an undecided entry is re-issued, else an undecided draft is gone on with, else a new
one is made. Then GO, reports, COMMIT. Whoever is lost on the way is announced with GONE: nobody waits for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from shoal.protocol.errors import Busy, MessageInvalid, NetworkError, NotHere, ShoalError, Stale, StreamBroken
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Message
from shoal.training.outer.change import Change
from shoal.training.outer.codecs import round_codecs
from shoal.training.outer.context import Context
from shoal.training.outer.entry import ENTRY_BYTES, SKIP, Contributor, Entry, Seat, draft_id, parse
from shoal.training.outer.line import LEADER_SILENCE_S, MEMBER_SILENCE_S, TICK_S, Line, lifeline, loopback
from shoal.training.outer.log import Log
from shoal.training.outer.lost import LostEntry
from shoal.training.outer.messages import Answer, Commit, Done, Go, Gone, Prepare, Report
from shoal.training.outer.policy import (
    GroupMember,
    clip_factors,
    closes_at,
    holds_quorum,
    may_leave,
    slowest_uplink,
)

COMMIT_S = 5.0  # for members to apply the entry; after that they are on their own, and catch up
_REPORT_SLACK_S = 2.0
HOLDERS_S = 30.0  # after a switch, for others of that chain to follow with the payloads that only they have
Follow = Callable[[Line], Awaitable[None]]


class Leader:
    """One attempt at one height."""

    def __init__(
        self,
        context: Context,
        log: Log,
        group: Sequence[GroupMember],
        silent: Sequence[PeerId],
        ballot: int,
        first_stage_head: bytes,
        follow: Follow,
        secure: Callable[[Entry, bytes], Awaitable[bool]],
        lost: LostEntry | None = None,
        mix: bytes = b"",
    ) -> None:
        """`secure` returns when an entry may be committed, however few have it; whether that took a while.

        `mix` is how the parts of a plain round are encoded, where the spec leaves that to measurement.
        """
        self._context = context
        self._log = log
        self._follow = follow
        self._secure = secure
        self._ballot = ballot
        self._deadline_s = context.spec.outer.round_deadline_s
        roster = tuple(
            Seat(member.peer, member.incarnation, member.uplink)
            for member in sorted(group, key=lambda member: member.peer)
        )
        contribution, published = round_codecs(
            context.spec.compression, log.height + 1, slowest_uplink([seat.uplink for seat in roster])
        )
        self._offer = Entry(
            stage=context.stage,
            height=log.height + 1,
            previous=log.head,
            ballot=ballot,
            leader=context.me,
            revision=max(context.amended.revision, log.revision),
            fragment=log.next_fragment.index,
            roster=roster,
            contributors=(),
            first_stage_head=first_stage_head,
            contribution=contribution,
            published=published,
            mix=mix,
        )
        self._lost_entry = lost
        self._plain = self._offer
        if lost is not None:
            self._offer = _reentry(self._offer, lost)
        self._offer_data = self._offer.encode()
        here = [seat.peer for seat in roster]
        # Before the first entry all who are known count: else each of them could begin alone.
        self._last = list(log.quorum) if log.height else [*here, *silent]
        self._lines: dict[PeerId, Line] = {}
        self._answers: dict[PeerId, Answer] = {}
        self._undecided: list[
            tuple[Entry, bytes]
        ] = []  # entries that somebody saw and nobody told us applied
        self._drafts: list[tuple[Entry, bytes]] = []
        self._draft: Entry | None = None
        self._reports: dict[int, bytes] = {}  # seat of the draft -> payload
        self._report_of = b""  # the draft's id
        self._done: set[PeerId] = set()
        self._lost: dict[PeerId, str] = {}
        # ... and later whose connection closes; never those merely silent: they may be going on without us.
        self._departed = set(self._last) - set(here) - set(silent)
        self._silent = frozenset(silent)
        self._contested = False  # somebody is in another leader's round
        self._ran_s = self._now()
        self._change = Change()
        self.highest_ballot = ballot  # met; the next attempt has to exceed it

    async def lead(self) -> Entry:
        """Returns the entry once this process has applied it. Raises Stale when the round cannot go on."""
        attending = [asyncio.create_task(self._attend(seat.peer)) for seat in self._offer.roster]
        attending.append(asyncio.create_task(self._watch()))
        try:
            entry = await self._conduct()
            limit_s = self._now() + COMMIT_S
            await self._change.until(lambda: not self._open() - self._done, lambda: limit_s)
            return entry
        finally:
            for task in attending:
                task.cancel()
            for outcome in await asyncio.gather(*attending, return_exceptions=True):
                if isinstance(outcome, Exception):
                    raise outcome

    async def _watch(self) -> None:
        """Notes that this process runs: one that was stopped must not go on as if nobody had taken over."""
        while not self._stood_still():
            self._ran_s = self._now()
            await asyncio.sleep(TICK_S)
        self._change.notify()

    def _stood_still(self) -> bool:
        return self._now() - self._ran_s > LEADER_SILENCE_S

    # -- one member each

    async def _attend(self, peer: PeerId) -> None:
        try:
            if peer == self._context.me:
                await self._attend_here()
                return
            transport, method = self._context.transport, self._context.method("round")
            async with transport.open(peer, method) as stream, lifeline(stream, MEMBER_SILENCE_S) as line:
                await self._converse(line)
        except ShoalError as error:
            self._lose(peer, error)
        except Exception as error:  # a bug of ours: `lead` raises it, and nobody may wait for this seat
            self._lost[peer] = repr(error)
            self._change.notify()
            raise

    async def _attend_here(self) -> None:
        ours, theirs = loopback(self._context.me)
        following = asyncio.ensure_future(self._follow(theirs))
        conversing = asyncio.ensure_future(self._converse(ours))
        try:
            done, _ = await asyncio.wait((following, conversing), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await conversing
        finally:
            for task in (following, conversing):
                task.cancel()
            await asyncio.gather(following, conversing, return_exceptions=True)

    async def _converse(self, line: Line) -> None:
        offer = self._offer
        line.post(Prepare(offer.height, offer.previous, offer.ballot), self._offer_data)
        answer = await line.receive(Answer, max_payload_bytes=2 * ENTRY_BYTES)
        self._note_answer(line, answer)
        try:
            while line.peer not in self._done:
                message = await line.receive(Report, Done, max_payload_bytes=ENTRY_BYTES)
                if isinstance(message.header, Report):
                    self._note_report(line.peer, message)
                else:
                    self._done.add(line.peer)
                self._change.notify()
        finally:
            self._lines.pop(line.peer, None)
            self._change.notify()

    def _note_answer(self, line: Line, message: Message[Any]) -> None:
        answer: Answer = message.header
        if answer.promised:
            self.highest_ballot = max(self.highest_ballot, answer.promised)
            raise Stale(f"{line.peer} has promised ballot {answer.promised}")
        if len(message.payload) != answer.draft_bytes + answer.entry_bytes:
            raise MessageInvalid(f"Answer of {line.peer}: {len(message.payload)} bytes")
        for found, start, size in (
            (self._drafts, 0, answer.draft_bytes),
            (self._undecided, answer.draft_bytes, answer.entry_bytes),
        ):
            if size:
                data = bytes(message.payload[start : start + size])
                entry = parse(data)
                if (entry.stage, entry.height, entry.previous) == self._place():
                    found.append((entry, data))
        self._answers[line.peer] = answer
        self._lines[line.peer] = line
        self._change.notify()

    def _note_report(self, peer: PeerId, message: Message[Any]) -> None:
        seat = self._draft.seat_of(peer) if self._draft is not None else None
        if self._draft is None or seat is None or message.header.draft != self._report_of:
            return
        parts = len(self._context.fragments[self._draft.fragment].parts)
        if len(message.payload) != parts * (32 + self._draft.bitmap_bytes):
            raise MessageInvalid(f"Report of {peer}: {len(message.payload)} bytes")
        self._reports[seat] = bytes(message.payload)

    def _lose(self, peer: PeerId, error: ShoalError) -> None:
        self._lost[peer] = str(error)
        self._context.event("member-lost", {"peer": peer, "height": self._offer.height, "why": str(error)})
        if isinstance(error, NetworkError):
            self._context.suspect(peer, str(error))
        if isinstance(error, StreamBroken):
            self._departed.add(peer)
        if isinstance(error, Busy):
            self._contested = True
        self._announce_gone([peer])
        self._change.notify()

    def _announce_gone(self, peers: Sequence[PeerId]) -> None:
        if self._draft is None:
            return
        for seat in (self._draft.seat_of(peer) for peer in peers):
            if seat is not None:
                self._post(Gone(seat))

    def _post(self, header: object, payload: bytes = b"") -> None:
        for line in list(self._lines.values()):
            try:
                line.post(header, payload)
            except NetworkError as error:
                self._lines.pop(line.peer, None)
                self._lose(line.peer, error)

    # -- the round

    async def _conduct(self) -> Entry:
        await self._gather_answers()
        if self._undecided:
            entry, data = max(self._undecided, key=lambda found: (found[0].ballot, found[0].leader))
            return await self._commit(entry, data)
        results: list[tuple[bytes, bytes] | None] = []
        if drafts := [found for found in self._drafts if not found[0].lost]:
            draft, data = max(drafts, key=lambda found: (found[0].ballot, found[0].leader))
            results = await self._gather_reports(draft, data)
        elif self._lost_entry is not None:
            return await self._bring_back(self._lost_entry)
        if not any(results):  # nothing undecided, or nothing left of it: what was sent is sent again
            # ... and as it was encoded: who is in that draft's round does not encode again.
            draft = self._new_draft(like=draft if drafts else self._plain)
            results = await self._gather_reports(draft, draft.encode())
        if not any(results):
            raise Stale(
                f"height {draft.height}: no part arrived anywhere; nothing is lost, the next round has it"
            )
        if draft.seat_of(self._context.me) is not None:
            draft = dataclasses.replace(draft, ballot=self._ballot, leader=self._context.me)
        entry = draft.finish(results, self._log.counted_tokens)
        return await self._commit(entry, entry.encode())

    async def _bring_back(self, lost: LostEntry) -> Entry:
        """Commit the re-entry of a lost entry, once all parts that are or may come here are with a majority.

        After some attempts in vain with those that are: one that nobody delivers is written off.
        """
        draft = dataclasses.replace(self._offer, roster=self._roster_present())
        results = await self._gather_reports(draft, draft.encode())
        waits = self._now() - lost.since_s < HOLDERS_S and self._may_be_held_by_the_absent(lost)
        missing = [p for p in lost.welcome if results[p] is None and (p in lost.parts or waits)]
        if missing and (waits or not lost.last_attempt):
            lost.attempts += int(not waits)
            raise Stale(f"height {draft.height}: parts {missing[:8]} of a lost entry are not with a majority")
        found = [
            result[0] if result and part in lost.welcome else SKIP for part, result in enumerate(results)
        ]
        entry = dataclasses.replace(draft, digests=b"".join(found), tokens=self._log.tokens_of(draft))
        return await self._commit(entry, entry.encode())

    def _may_be_held_by_the_absent(self, lost: LostEntry) -> bool:
        """Whether somebody lives who was in that round and not in this one: it may still be catching up."""
        there = {lost.entry.roster[seat].peer for seat in lost.entry.present()}
        absent = {seat.peer for seat in self._offer.roster} - self._answers.keys()
        return not there.isdisjoint(absent)

    def _roster_present(self) -> tuple[Seat, ...]:
        """The roster, with those present who answered."""
        return tuple(
            dataclasses.replace(seat, present=seat.peer in self._answers) for seat in self._offer.roster
        )

    async def _gather_answers(self) -> None:
        opened_s = self._now()
        quorum_s: float | None = None
        everybody = {seat.peer for seat in self._offer.roster}

        def complete() -> bool:
            nonlocal quorum_s
            if (
                quorum_s is None
                and self._context.me in self._answers
                and len(self._answers) * 2 > len(everybody)
            ):
                quorum_s = self._now()
            return self._ahead() or everybody <= self._answers.keys() | self._lost.keys()

        await self._change.until(complete, lambda: closes_at(opened_s, quorum_s, self._deadline_s))
        if self._ahead():
            raise Stale(f"height {self._offer.height} has been decided without this peer; catch up")
        if self._context.me not in self._answers:
            raise Stale(f"this peer cannot lead: {self._lost.get(self._context.me, 'its weights are busy')}")
        self._require_quorum(list(self._answers))

    def _new_draft(self, like: Entry) -> Entry:
        """Everybody who answered is present; who has tokens contributes, in the codecs of `like`."""
        seats = enumerate(self._offer.roster)
        given = [(i, self._answers[seat.peer]) for i, seat in seats if seat.peer in self._answers]
        given = [(i, answer) for i, answer in given if answer.tokens and answer.to_step > answer.from_step]
        clips = clip_factors([answer.norm for _, answer in given], [answer.tokens for _, answer in given])
        rows = [
            Contributor(i, a.from_step, a.to_step, a.tokens, a.norm, clip, a.positions)
            for (i, a), clip in zip(given, clips, strict=True)
        ]
        if not rows:
            raise Stale(f"height {self._offer.height}: nobody has made a step")
        for (_, answer), clip in zip(given, clips, strict=True):
            if clip < 1.0:
                self._context.event("clipped", {"norm": answer.norm, "factor": clip})
        answers = self._answers
        leaving = may_leave(
            [peer for peer, answer in answers.items() if answer.leaves],
            list(answers),
            self._log.leaving,
            self._context.spec.stages.minimum_replicas,
        )
        return dataclasses.replace(
            self._plain,
            roster=self._roster_present(),
            contributors=tuple(rows),
            leaving=leaving,
            contribution=like.contribution,
            published=like.published,
            mix=like.mix,
        )

    async def _gather_reports(self, draft: Entry, data: bytes) -> list[tuple[bytes, bytes] | None]:
        """GO, then wait for the report of everybody present who is not lost."""
        self._draft, self._report_of, self._reports = draft, draft_id(data), {}
        present = {draft.roster[seat].peer for seat in draft.present()}
        self._post_to(present, Go(self._deadline_s), data)
        self._announce_gone(sorted(present - self._answers.keys() | present & self._lost.keys()))
        limit_s = self._now() + 2 * self._deadline_s + _REPORT_SLACK_S

        def complete() -> bool:
            open_ = {draft.seat_of(peer) for peer in self._open() & present}
            return open_ <= self._reports.keys()

        await self._change.until(complete, lambda: limit_s)
        reporters = [draft.roster[seat].peer for seat in self._reports]
        bystanders = self._bystanders(draft)
        self._require_quorum([*reporters, *bystanders])
        return self._results(draft, len(reporters) + len(bystanders))

    def _bystanders(self, draft: Entry) -> set[PeerId]:
        """Those here who were not present in a draft that is gone on with: they can hold nothing of it.

        A draft from a side of a cut may have lost all but one of its members. That one must not wait for
        them for ever, nor commit alone what it alone holds: with the bystanders it can begin anew. Not while
        a member is silent: it may have committed that draft.
        """
        present = {draft.roster[seat].peer for seat in draft.present()}
        missing = present - {draft.roster[seat].peer for seat in self._reports}
        offered = {seat.peer for seat in self._offer.roster}
        if any(peer in self._silent or peer in offered - self._departed for peer in missing):
            return set()
        return self._open() - present

    def _require_quorum(self, here: Sequence[PeerId]) -> None:
        """Raises Stale unless enough of the last round's members are here, not counting those that departed.

        Silent ones count: they may be committing without this peer, on the other side of a cut.
        """
        if self._stood_still():
            raise Stale("this process stood still for a while; another may have taken over")
        verdict = holds_quorum(self._last, self._departed, here, self._log.head, self._contested)
        if not verdict.yes:
            raise Stale(f"height {self._offer.height}: {verdict.reason}; {self._lost}")

    def _results(self, draft: Entry, here: int) -> list[tuple[bytes, bytes] | None]:
        """What to commit of each part: the digest that most reporters hold, if they are more than half of
        those `here`.

        A part in the hands of a few could be lost with them after COMMIT, and the chain with it.
        """
        parts, width = len(self._context.fragments[draft.fragment].parts), draft.bitmap_bytes
        reports = [self._reports[seat] for seat in sorted(self._reports)]
        if not reports:
            return [None] * parts
        results: list[tuple[bytes, bytes] | None] = []
        for part in range(parts):
            at = 32 * parts + width * part
            held = Counter(
                (report[32 * part : 32 * part + 32], report[at : at + width]) for report in reports
            )
            (digest, listed), holders = max(held.items(), key=lambda item: (item[0][0] != SKIP, item[1]))
            results.append((digest, listed) if digest != SKIP and 2 * holders > here else None)
        return results

    async def _commit(self, entry: Entry, data: bytes) -> Entry:
        """COMMIT to all, and wait until this process has applied it."""
        if await self._secure(entry, data) and self._stood_still():
            raise Stale("this process stood still for a while; another may have taken over")
        self._post(Commit(), data)
        me = self._context.me
        await self._change.until(lambda: me in self._done or me in self._lost, lambda: None)
        if me in self._lost:
            raise NotHere(f"entry {entry.height} could not be applied here: {self._lost[me]}")
        return entry

    def _post_to(self, peers: set[PeerId], header: object, payload: bytes) -> None:
        for peer in sorted(peers & self._lines.keys()):
            try:
                self._lines[peer].post(header, payload)
            except NetworkError as error:
                self._lose(peer, error)

    # -- views

    def _place(self) -> tuple[int, int, bytes]:
        return self._offer.stage, self._offer.height, self._offer.previous

    def _ahead(self) -> bool:
        return any(answer.height >= self._offer.height for answer in self._answers.values())

    def _open(self) -> set[PeerId]:
        """Members that can still be heard."""
        return set(self._lines)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _reentry(offer: Entry, lost: LostEntry) -> Entry:
    """The draft that brings a lost entry back: fragment and codecs are those of its round."""
    return dataclasses.replace(
        offer,
        fragment=lost.entry.fragment,
        contribution=lost.entry.contribution,
        published=lost.entry.published,
        mix=lost.entry.mix,
        lost=lost.data,
        scale=lost.scale,
    )
