"""Leader: conducts one round of a group, or finishes the one that a lost leader left.

PREPARE fixes height, ballot and roster; the answers tell what there is to contribute and what is undecided.
Highest first, an undecided entry is re-issued, else an undecided draft is gone on with, else a new
one is made. Then GO, reports, COMMIT. Whoever is lost on the way is announced with GONE: nobody waits for it.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence

from shoal.protocol.errors import NotHere, Stale
from shoal.protocol.identity import PeerId
from shoal.training.outer.attendance import Attendance, Follow
from shoal.training.outer.context import Context
from shoal.training.outer.entry import SKIP, Entry
from shoal.training.outer.line import LEADER_SILENCE_S, TICK_S
from shoal.training.outer.log import Log
from shoal.training.outer.lost import LostEntry
from shoal.training.outer.owners import Owner
from shoal.training.outer.policy import (
    REPORT_SLACK_S,
    GroupMember,
    closes_at,
    holds_quorum,
    introducers,
)
from shoal.training.outer.proposal import draft_of, plain_offer, reentry_offer, with_present
from shoal.training.outer.report import Decided, most_held
from shoal.training.outer.round import delivered, draw_owners

COMMIT_S = 5.0  # for members to apply the entry; after that they are on their own, and catch up
HOLDERS_S = 30.0  # after a switch, for others of that chain to follow with the payloads that only they have


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
        self._secure = secure
        self._ballot = ballot
        self._deadline_s = context.spec.outer.round_deadline_s
        self._plain = plain_offer(context, log, group, ballot, first_stage_head, mix)
        self._offer = self._plain if lost is None else reentry_offer(self._plain, lost)
        self._lost_entry = lost
        here = [seat.peer for seat in self._offer.roster]
        # Before the first entry all who are known count: else each of them could begin alone.
        self._last = list(log.quorum) if log.height else [*here, *silent]
        self._silent = frozenset(silent)
        self._unheard = frozenset(member.peer for member in group if not member.heard)
        departed = set(self._last) - set(here) - set(silent)
        knowing = introducers(context.me, log.leader, log.quorum, group)
        self._group = Attendance(context, self._offer, follow, departed, knowing, log)
        self._change = self._group.change
        self._ran_s = self._now()
        self._told: set[PeerId] = set()  # who told of the undecided entry that was re-issued
        self.published: dict[Owner, bool] = {}  # owners in the last draft: something came of theirs

    @property
    def highest_ballot(self) -> int:
        """Met; the next attempt has to exceed it."""
        return self._group.highest_ballot

    @property
    def reached(self) -> set[PeerId]:
        """Members who are there, whatever they said."""
        return {*self._group.answers} | {*self._group.lost} - self._group.unreached

    @property
    def unreached(self) -> set[PeerId]:
        """Members who told nothing before this attempt, and could not be reached by it."""
        return {*self._unheard & self._group.unreached - self._group.answers.keys()}

    @property
    def claimed(self) -> set[PeerId]:
        """Members for whose word this attempt was in vain: of this height's entry, decided or to be."""
        return self.ahead | self._told

    @property
    def ahead(self) -> set[PeerId]:
        """Members who say that they have the entry already that this attempt was to make."""
        answers = self._group.answers.items()
        return {peer for peer, answer in answers if answer.height >= self._offer.height}

    async def lead(self) -> Entry:
        """Returns the entry once this process has applied it. Raises Stale when the round cannot go on."""
        attending = self._group.begin()
        attending.append(asyncio.create_task(self._watch()))
        try:
            entry = await self._conduct()
            limit_s = self._now() + COMMIT_S
            await self._change.until(lambda: not self._group.open - self._group.done, lambda: limit_s)
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

    # -- the round

    async def _conduct(self) -> Entry:
        await self._gather_answers()
        if undecided := self._group.undecided:
            entry, data = max(undecided.values(), key=lambda found: (found[0].ballot, found[0].leader))
            self._told = {peer for peer, (_, same) in undecided.items() if same == data}
            return await self._commit(entry, data)
        results: list[Decided | None] = []
        if drafts := [found for found in self._group.drafts if not found[0].lost]:
            draft, data = max(drafts, key=lambda found: (found[0].ballot, found[0].leader))
            results = await self._gather_reports(draft, data)
        elif self._lost_entry is not None:
            return await self._bring_back(self._lost_entry)
        if not any(results):  # nothing undecided, or nothing left of it: what was sent is sent again
            # ... and as it was encoded: who is in that draft's round does not encode again.
            draft = self._new_draft(like=draft if drafts else self._plain)
            if draft.contributors:
                results = await self._gather_reports(draft, draft.encode())
            else:  # it says who may leave, and no more
                results = [None] * len(self._context.fragments[draft.fragment].parts)
        if draft.contributors and not any(results):
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
        roster = with_present(self._offer.roster, self._group.answers)
        draft = dataclasses.replace(self._offer, roster=roster)
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
        absent = {seat.peer for seat in self._offer.roster} - self._group.answers.keys()
        return not there.isdisjoint(absent)

    async def _gather_answers(self) -> None:
        opened_s = self._now()
        quorum_s: float | None = None
        everybody = {seat.peer for seat in self._offer.roster}

        def complete() -> bool:
            nonlocal quorum_s
            if (
                quorum_s is None
                and self._context.me in self._group.answers
                and len(self._group.answers) * 2 > len(everybody)
            ):
                quorum_s = self._now()
            return bool(self.ahead) or everybody <= self._group.answers.keys() | self._group.lost.keys()

        await self._change.until(complete, lambda: closes_at(opened_s, quorum_s, self._deadline_s))
        if self.ahead:
            raise Stale(f"height {self._offer.height} has been decided without this peer; catch up")
        for peer in sorted(self._unheard - self._group.answers.keys() - self._group.lost.keys()):
            self._group.miss(peer)
        if self._context.me not in self._group.answers:
            reason = self._group.lost.get(self._context.me, "its weights are busy")
            raise Stale(f"this peer cannot lead: {reason}")
        self._require_quorum(list(self._group.answers))

    def _new_draft(self, like: Entry) -> Entry:
        """Everybody who answered is present; who has tokens contributes, in the codecs of `like`.

        Without anybody who does there is a round only for somebody who is let go: to a stage that stands
        still, perhaps, and without which nobody makes a step.
        """
        spec = self._context.amended.at(self._plain.revision)
        draft = draft_of(
            self._plain,
            self._group.answers,
            like,
            self._log,
            spec.stages.minimum_replicas,
            spec.outer.inner_steps * spec.inner.inner_tokens,
        )
        if not draft.contributors and not draft.leaving:
            raise Stale(f"height {draft.height}: nobody has made a step")
        for row in draft.contributors:
            if row.clip < 1.0:
                self._context.event("clipped", {"norm": row.norm, "factor": row.clip})
        return draft

    async def _gather_reports(self, draft: Entry, data: bytes) -> list[Decided | None]:
        """GO, then wait for the report of everybody present who is not lost; for some only as long again as
        it took most of them, or one that ticks and reports nothing would hold every round up.

        Who reports has all that can come: what the others still wait for is with a majority.
        """
        present = {draft.roster[seat].peer for seat in draft.present()}
        self._group.go(draft, data, self._deadline_s)
        opened_s, longest_s = self._now(), 2 * self._deadline_s + REPORT_SLACK_S
        quorum_s: float | None = None

        def complete() -> bool:
            nonlocal quorum_s
            if quorum_s is None and 2 * len(self._group.reports) > len(present):
                quorum_s = self._now()
            open_ = {draft.seat_of(peer) for peer in self._group.open & present}
            return open_ <= self._group.reports.keys()

        await self._change.until(complete, lambda: closes_at(opened_s, quorum_s, longest_s))
        reporters = [draft.roster[seat].peer for seat in self._group.reports]
        bystanders = self._bystanders(draft)
        self._require_quorum([*reporters, *bystanders])
        reports = [payload for _, payload in sorted(self._group.reports.items())]
        fragment = self._context.fragments[draft.fragment]
        size = len(reporters) + len(bystanders)
        results = most_held(reports, size, len(fragment.parts), draft.bitmap_bytes)
        if not draft.lost:
            owner_of = draw_owners(self._context, draft, fragment)
            self.published = delivered(draft, owner_of, [result is not None for result in results])
        return results

    def _bystanders(self, draft: Entry) -> set[PeerId]:
        """Those here who were not present in a draft that is gone on with: they can hold nothing of it.

        A draft from a side of a cut may have lost all but one of its members. That one must not wait for
        them for ever, nor commit alone what it alone holds: with the bystanders it can begin anew. Not while
        a member is silent: it may have committed that draft.
        """
        present = {draft.roster[seat].peer for seat in draft.present()}
        missing = present - {draft.roster[seat].peer for seat in self._group.reports}
        offered = {seat.peer for seat in self._offer.roster}
        if any(peer in self._silent or peer in offered - self._group.departed for peer in missing):
            return set()
        return self._group.open - present

    def _require_quorum(self, here: Sequence[PeerId]) -> None:
        """Raises Stale unless enough of the last round's members are here, not counting those that departed.

        Silent ones count: they may be committing without this peer, on the other side of a cut.
        """
        if self._stood_still():
            raise Stale("this process stood still for a while; another may have taken over")
        verdict = holds_quorum(self._last, self._group.departed, here, self._log.head, self._group.contested)
        if not verdict.yes:
            raise Stale(f"height {self._offer.height}: {verdict.reason}; {self._group.lost}")

    async def _commit(self, entry: Entry, data: bytes) -> Entry:
        """COMMIT to all, and wait until this process has applied it."""
        if await self._secure(entry, data) and self._stood_still():
            raise Stale("this process stood still for a while; another may have taken over")
        self._group.commit(data)
        me = self._context.me
        await self._change.until(lambda: me in self._group.done or me in self._group.lost, lambda: None)
        if me in self._group.lost:
            raise NotHere(f"entry {entry.height} could not be applied here: {self._group.lost[me]}")
        return entry

    # -- views

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
