"""Attendance: the members of one attempt at a height, as its leader hears them.

Each has a stream of its own: PREPARE out, the answer, reports and DONE in. Whoever is lost on the way is
announced with GONE, so that nobody waits for it. `Leader` decides by what is noted here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from shoal.protocol.errors import Busy, MessageInvalid, NetworkError, ShoalError, Stale, StreamBroken
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Message
from shoal.training.outer.change import Change
from shoal.training.outer.context import Context
from shoal.training.outer.entry import ENTRY_BYTES, Entry, draft_id, parse
from shoal.training.outer.line import MEMBER_SILENCE_S, Line, lifeline, loopback
from shoal.training.outer.log import Log
from shoal.training.outer.messages import Answer, Commit, Done, Go, Gone, Prepare, Report
from shoal.training.outer.promise import LEAP
from shoal.training.outer.report import report_bytes

Follow = Callable[[Line], Awaitable[None]]


class Attendance:
    """What came from whom, and the way to all of them; `change` is notified at everything that comes."""

    def __init__(
        self,
        context: Context,
        offer: Entry,
        follow: Follow,
        departed: Collection[PeerId],
        introducers: Sequence[PeerId],
        log: Log,
    ) -> None:
        """`follow` is this process's own part in its round; `departed` have left before it; `introducers`
        may know those of the last one. `log` says what members may tell of."""
        self.change = Change()
        self.answers: dict[PeerId, Answer] = {}
        self.undecided: dict[PeerId, tuple[Entry, bytes]] = {}  # who saw an entry that is not applied there
        self.drafts: list[tuple[Entry, bytes]] = []
        self.reports: dict[int, bytes] = {}  # seat of the draft -> payload
        self.done: set[PeerId] = set()
        self.lost: dict[PeerId, str] = {}
        self.unreached: set[PeerId] = set()  # those of them who may not be there at all
        # ... and later whose connection closes amid it; never the merely silent: they may be going on without
        # us. A stream that brought nothing may have ended because of the silence.
        self.departed = set(departed)
        self.contested = False  # somebody is in another leader's round
        self.highest_ballot = offer.ballot  # met; the next attempt has to exceed it
        self._context = context
        self._offer = offer
        self._offer_data = offer.encode()
        self._follow = follow
        self._introducers = introducers
        self._log = log
        self._lines: dict[PeerId, Line] = {}
        self._draft: Entry | None = None
        self._report_of = b""  # the draft's id

    @property
    def open(self) -> set[PeerId]:
        """Members that can still be heard."""
        return set(self._lines)

    def begin(self) -> list[asyncio.Task[None]]:
        """A task for every seat; whoever calls this owns them."""
        return [asyncio.create_task(self._attend(seat.peer)) for seat in self._offer.roster]

    def go(self, draft: Entry, data: bytes, deadline_s: float) -> None:
        """GO to everybody present in a draft; reports are of this one from now on."""
        self._draft, self._report_of, self.reports = draft, draft_id(data), {}
        present = {draft.roster[seat].peer for seat in draft.present()}
        for peer in sorted(present & self._lines.keys()):
            self._post(self._lines[peer], Go(deadline_s), data)
        self._announce_gone(sorted(present - self.answers.keys() | present & self.lost.keys()))

    def commit(self, data: bytes) -> None:
        """COMMIT to all who can be heard."""
        self._post_to_all(Commit(), data)

    def miss(self, peer: PeerId) -> None:
        """It has not answered in time, and nobody heard of it: the next round shall not wait for it, too."""
        self.unreached.add(peer)
        self._context.suspect(peer, "no answer to PREPARE")

    # -- one member each

    async def _attend(self, peer: PeerId) -> None:
        try:
            if peer == self._context.me:
                await self._attend_here()
                return
            transport, method = self._context.transport, self._context.method("round")
            for introducer in self._introducers:
                await self._context.meet(peer, (self._context.me, introducer, peer))
            async with transport.open(peer, method) as stream, lifeline(stream, MEMBER_SILENCE_S) as line:
                await self._converse(line)
        except ShoalError as error:
            self._lose(peer, error)
        except Exception as error:  # a bug of ours: `lead` raises it, and nobody may wait for this seat
            self.lost[peer] = repr(error)
            self.change.notify()
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
            while line.peer not in self.done:
                message = await line.receive(Report, Done, max_payload_bytes=ENTRY_BYTES)
                if isinstance(message.header, Report):
                    self._note_report(line.peer, message)
                else:
                    self.done.add(line.peer)
                self.change.notify()
        finally:
            self._lines.pop(line.peer, None)
            self.change.notify()

    def _note_answer(self, line: Line, message: Message[Any]) -> None:
        answer: Answer = message.header
        if answer.promised > self._offer.ballot + LEAP:
            raise MessageInvalid(f"{line.peer} says that it has promised ballot {answer.promised}")
        if answer.promised:
            self.highest_ballot = max(self.highest_ballot, answer.promised)
            raise Stale(f"{line.peer} has promised ballot {answer.promised}")
        if len(message.payload) != answer.draft_bytes + answer.entry_bytes:
            raise MessageInvalid(f"Answer of {line.peer}: {len(message.payload)} bytes")
        told = bytes(message.payload)
        if data := told[: answer.draft_bytes]:
            self._log.check_draft(parse(data))
            self.drafts.append((parse(data), data))
        if data := told[answer.draft_bytes :]:
            self._log.check(parse(data))
            self.undecided[line.peer] = parse(data), data
        self.answers[line.peer] = answer
        self._lines[line.peer] = line
        self.change.notify()

    def _note_report(self, peer: PeerId, message: Message[Any]) -> None:
        seat = self._draft.seat_of(peer) if self._draft is not None else None
        if self._draft is None or seat is None or message.header.draft != self._report_of:
            return
        parts = len(self._context.fragments[self._draft.fragment].parts)
        if len(message.payload) != report_bytes(parts, self._draft.bitmap_bytes):
            raise MessageInvalid(f"Report of {peer}: {len(message.payload)} bytes")
        self.reports[seat] = bytes(message.payload)

    def _lose(self, peer: PeerId, error: ShoalError) -> None:
        self.lost[peer] = str(error)
        self._context.event("member-lost", {"peer": peer, "height": self._offer.height, "why": str(error)})
        if isinstance(error, NetworkError):
            self._context.suspect(peer, str(error))
            self.unreached.add(peer)
        if isinstance(error, StreamBroken) and peer in self.answers:  # else nobody knows that it was there
            self.departed.add(peer)
        if isinstance(error, Busy):
            self.contested = True
        self._announce_gone([peer])
        self.change.notify()

    def _announce_gone(self, peers: Sequence[PeerId]) -> None:
        if self._draft is None:
            return
        for seat in (self._draft.seat_of(peer) for peer in peers):
            if seat is not None:
                self._post_to_all(Gone(seat))

    def _post_to_all(self, header: object, payload: bytes = b"") -> None:
        for line in list(self._lines.values()):
            self._post(line, header, payload)

    def _post(self, line: Line, header: object, payload: bytes) -> None:
        try:
            line.post(header, payload)
        except NetworkError as error:
            self._lines.pop(line.peer, None)
            self._lose(line.peer, error)
