"""Member: how a replica follows rounds, whoever leads; the leader is a member of its own round too.

Decides nothing but what a promise binds it to: it refuses lower ballots, it refuses a second leader while the
first is alive, and it tells a new leader what is still undecided. `follow` brings the messages here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from shoal.protocol.errors import Busy, MessageInvalid, NotHere, ShoalError, Stale
from shoal.protocol.faults import define
from shoal.protocol.faulty_transport import point
from shoal.protocol.identity import PeerId
from shoal.training.outer.change import Change
from shoal.training.outer.codecs import codecs_of
from shoal.training.outer.context import Context
from shoal.training.outer.contribution import Contribution
from shoal.training.outer.entry import Entry, StreamPosition, parse
from shoal.training.outer.fetch import fetch_parts
from shoal.training.outer.leaders import Leaders, check_offer
from shoal.training.outer.local import LocalWeights
from shoal.training.outer.messages import Answer, Prepare
from shoal.training.outer.orders import knows
from shoal.training.outer.phases import Phases
from shoal.training.outer.policy import in_turns
from shoal.training.outer.promise import Promise, Promises
from shoal.training.outer.reduce import Published
from shoal.training.outer.reentry import Reentering
from shoal.training.outer.replica import Replica
from shoal.training.outer.round import Round, draw_owners

GO_LAG_S = 2.0  # a neighbour's contribution may be here before the leader's GO
APART_S = 2.0  # that others go without a member which repairs its state: as long as a silent one delays them
_TOKENS_REMEMBERED = 1024  # contributions; of older ones the log's count has to do
NORM_MOST = 1e18  # entry.Norm's bound
_APPLYING, _APPLIED = define("entry.applying"), define("entry.applied")
log = logging.getLogger(__name__)
Positions = Callable[[int], Sequence[tuple[int, int]]]  # of the data streams, as of an inner step


class Member:
    """One replica's state in and between rounds."""

    def __init__(
        self,
        context: Context,
        replica: Replica,
        local: LocalWeights,
        positions: Positions,
        change: Change,
        promises: Promises,
        leaders: Leaders,
    ) -> None:
        self.replica = replica
        self.change = change  # notified at GO, at every COMMIT, and when a leader is lost
        self.promises = promises
        self.leaves = False  # it asks the group to be let go
        self.engaged_with: PeerId | None = None  # the leader of the round under way ...
        self._engaged_by = (0, 0)  # ... and the height it is about, and the ballot of this attempt at it
        self.undecided_since_s: float | None = None  # since when a round stands without leader
        self.round: Round | Reentering | None = None
        self._context = context
        self._leaders = leaders
        self._local = local
        self._positions = positions
        self.contribution: Contribution | None = None  # to the height to come
        self._tokens_at: dict[int, int] = {}  # steps that were contributed up to -> all tokens by then
        self._listed_s: dict[int, float] = {}  # by part: when an entry last listed this process there
        self.mixes: dict[int, bytes] = {}  # by fragment, as the last contribution suggests
        self.phases = Phases()
        self._reached: set[PeerId] = set()  # who may have got some of it, by whatever draft
        self._unapplied: bytes | None = None  # an entry of the height to come whose parts are not all here
        self._apart_until_s = -math.inf  # the own state is being repaired: no new round
        self._deciding = asyncio.Lock()  # one entry at a time; no copy of weights in the middle of one
        self._tasks: set[asyncio.Task[object]] = set()
        self._encoding: asyncio.Task[object] | None = None  # one of them, of the contribution

    @property
    def next_height(self) -> int:
        return self.replica.log.height + 1

    # -- the leader's messages, in their order

    async def prepare(self, prepare: Prepare, offer: bytes, leader: PeerId) -> tuple[Answer, bytes]:
        """Promise a ballot and say what there is to contribute. Raises Stale, Busy or MessageInvalid."""
        loop = asyncio.get_running_loop()
        self._leaders.check(leader, loop.time())
        entry = parse(offer)
        check_offer(self._context, prepare, entry, leader)
        follows = (prepare.height, prepare.previous) == (self.next_height, self.replica.log.head)
        if follows and not await knows(self._context, entry.revision, [leader]):
            raise Stale(f"revision {entry.revision} of the settings is not known here")
        async with self._deciding:
            log = self.replica.log
            if prepare.height <= log.height and log.head_at(prepare.height - 1) == prepare.previous:
                return Answer(log.height, 0, 0, 0, 0.0, ()), b""
            if prepare.height != self.next_height or prepare.previous != log.head:
                raise Stale(f"height {log.height}, head {log.head.hex()[:8]} here; this peer has to catch up")
            if self.engaged_with not in (None, leader):
                raise Busy(f"in a round with {self.engaged_with}", retry_after_s=1.0)
            asked = Promise(prepare.previous, prepare.ballot, leader)
            bound = self.promises.current
            if bound.leaps(asked):
                raise MessageInvalid(f"ballot {asked.ballot} after {bound.ballot}")
            if bound.binds(asked):
                return Answer(log.height, 0, 0, 0, 0.0, (), promised=bound.ballot), b""
            if self.idle and loop.time() < self._apart_until_s:
                raise Stale("this peer has to repair its state first")
            if entry.fragment != log.next_fragment.index and not entry.lost:
                raise MessageInvalid(f"height {entry.height} synchronises fragment {log.next_fragment.index}")
            await self.promises.give(asked)
            self.engaged_with, self._engaged_by = leader, (prepare.height, prepare.ballot)
            self._leaders.engage(leader, loop.time())
            self.phases.prepare()
            if not self._reached:  # else somebody may have some of what an earlier attempt's round sends
                # Steps have to come in order: those that were lost first.
                waits = entry.lost or self.replica.lost
                made = None if waits else await self._contribute(entry)
                if not self._reached:  # else that one's GO was slow
                    self._offer(made)
            self.phases.end("prepare")
            self.phases.begin("wait")
            return self._answer()

    async def _contribute(self, offer: Entry) -> Contribution:
        fragment = self.replica.log.next_fragment
        codecs, anchor = codecs_of(offer, len(fragment.parts)), self.replica.anchor_of(fragment.index)
        carried = self.replica.residuals.carried(fragment.parts)
        return await Contribution.take(self._context, self._local, fragment, codecs, anchor, carried)

    def _offer(self, made: Contribution | None) -> None:
        """What this process has for the height to come, instead of what it had: encoded from GO on."""
        if self._encoding is not None:
            self._encoding.cancel()
        self.contribution, self._encoding = made, None

    async def _encode(self, made: Contribution) -> None:
        await made.encode(self._context)
        self.mixes[made.fragment.index] = made.mix

    def _answer(self) -> tuple[Answer, bytes]:
        log, context, mine = self.replica.log, self._context, self.contribution
        draft = self.round.data if self.round is not None else b""
        entry = self._unapplied or b""
        from_step, from_tokens = log.end_of(context.me, context.incarnation, log.next_fragment.index)
        answer = Answer(
            log.height,
            from_step,
            from_step,
            tokens=0,
            norm=0.0,
            positions=(),
            draft_bytes=len(draft),
            entry_bytes=len(entry),
            leaves=self.leaves,
            incarnation=context.incarnation,
        )
        if mine is not None:
            from_tokens = self._tokens_at.get(from_step, from_tokens)  # an entry may count fewer
            self._note_tokens(mine.sent.inner_step, mine.sent.tokens)
            if math.isfinite(mine.norm) and mine.norm <= NORM_MOST:
                answer = dataclasses.replace(
                    answer,
                    to_step=mine.sent.inner_step,
                    tokens=max(mine.sent.tokens - from_tokens, 0),
                    norm=mine.norm,
                    positions=tuple(StreamPosition(*read) for read in self._positions(mine.sent.inner_step)),
                )
            else:
                context.event("weights-not-finite", {"norm": str(mine.norm)})
        return answer, draft + entry

    def _note_tokens(self, step: int, tokens: int) -> None:
        self._tokens_at[step] = tokens
        if len(self._tokens_at) > _TOKENS_REMEMBERED:
            del self._tokens_at[next(iter(self._tokens_at))]

    async def go(self, data: bytes, deadline_s: float) -> Round | Reentering:
        """Begin the data plane of a draft; the same draft again, from a new leader, changes nothing."""
        draft = parse(data)
        self.replica.log.check_draft(draft)
        if self.round is not None and self.round.data == data:
            return self.round
        if draft.lost:
            round_: Round | Reentering
            round_ = Reentering(self._context, data, draft, self.replica.lost, deadline_s)
        else:
            round_ = await self._contributing(data, draft, deadline_s)
        if draft.previous != self.replica.log.head:
            raise Stale(f"GO for height {draft.height} at height {self.replica.log.height}")
        before, self.round = self.round, round_
        self.phases.end("wait")
        round_.start()
        self.change.notify()
        if before is not None:  # only now: one that has been closed would not go on for the next leader
            await before.close()
        return round_

    async def _contributing(self, data: bytes, draft: Entry, deadline_s: float) -> Round:
        fragment = self.replica.log.next_fragment
        codecs = codecs_of(draft, len(fragment.parts))
        owner_of = await self._context.offload(draw_owners, self._context, draft, fragment)
        mine = self.contribution
        seat = draft.seat_of(self._context.me, self._context.incarnation)
        row = draft.row_of(seat) if seat is not None else None
        if row is None or mine is None or mine.sent.inner_step != row.to_step or mine.codecs != codecs:
            mine = None  # a draft of another attempt: this peer is not listed, and loses nothing
        if mine is not None and seat is not None:
            self._reached |= {draft.roster[seat].peer for seat in draft.present()}
            if self._encoding is None:  # else for an earlier draft
                listed_s = [self._listed_s.get(part.index, -math.inf) for part in fragment.parts]
                mine.order = in_turns(owner_of, seat, listed_s)
                self._encoding = self._begin(self._encode(mine))
        residuals, step = self.replica.residuals, self.replica.begin_step(draft)
        return Round(
            self._context,
            data,
            draft,
            fragment,
            codecs,
            mine,
            residuals,
            owner_of,
            step,
            deadline_s,
            self.phases,
        )

    async def commit(self, data: bytes, holders: Sequence[PeerId] = (), *, replayed: bool = False) -> None:
        """Apply an entry, from a leader's COMMIT or from a donor. Goes on when its caller is cancelled.

        `replayed`: it is of some time ago; the holders are here, those who were in its round need not be.
        Raises Stale or MessageInvalid from the log's rules, NotHere when a part is found nowhere, Busy for an
        entry under settings that are not known here yet.
        """
        await asyncio.shield(self._begin(self._commit(data, holders, replayed)))

    def _begin(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        """A task that ends with this member at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        error = task.exception() if not task.cancelled() else None
        if error is not None and not isinstance(error, ShoalError):
            # Others the caller has, or went away and will learn from the next PREPARE.
            log.error("the work of a round failed", exc_info=error)
            self._context.event("round-failed", {"height": self.next_height, "why": repr(error)})

    async def _commit(self, data: bytes, holders: Sequence[PeerId], replayed: bool) -> None:
        entry = parse(data)
        if entry.height > self.replica.log.height and not await knows(self._context, entry.revision, holders):
            # Once in the log, a revision that the owner never made would be in the way of all later rounds.
            raise Busy(f"revision {entry.revision} of the settings is not known here", retry_after_s=1.0)
        async with self._deciding:
            log = self.replica.log  # a jump may have put another in its place meanwhile
            if entry.height <= log.height:
                if log.entry(entry.height) == data:
                    return
                raise Stale(f"height {entry.height} is decided here, by another entry")
            log.check(entry)
            self._unapplied = data
            held = self.round.held if self.round is not None else {}
            present = (PeerId(entry.roster[seat].peer) for seat in entry.present())
            asked = dict.fromkeys(p for p in (*holders, *present) if p != self._context.me)
            first = [peer for peer in asked if not replayed or peer in holders]
            others = [peer for peer in asked if peer not in first]
            try:
                published = await fetch_parts(self._context, entry, held, first, others)
            except NotHere:
                # Nobody alive can apply this entry: a new leader may decide the height anew (section 9).
                self._unapplied = None
                raise
            round_ = self.round if isinstance(self.round, Round) else None
            begun = round_ is not None and not entry.lost and _codecs(round_.draft) == _codecs(entry)
            self.phases.end("decide")
            self.phases.begin("apply")
            await point(self._context.transport, _APPLYING)
            await self.replica.apply(
                data,
                published,
                self._local,
                self.contribution,
                round_.step if round_ is not None and begun else None,
                frozenset(self._reached),
            )
            await self.replica.sift(self._local)
            parts = self._context.fragments[entry.fragment].parts
            listed, now_s = self.replica.offered.lists(entry), asyncio.get_running_loop().time()
            self._listed_s |= {parts[number].index: now_s for number in listed}
            await point(self._context.transport, _APPLIED)
            if round_ is not None:
                self.replica.residuals.retire_published(round_.remainders(entry))
            await self._leave_round()
            self._leaders.entered(PeerId(entry.leader))
        self.change.notify()

    async def _leave_round(self) -> None:
        if self.round is not None:
            await self.round.close()
        self._offer(None)
        self.round, self._unapplied, self.undecided_since_s = None, None, None
        self._reached.clear()
        self.engaged_with = None  # at once: the next leader's PREPARE may be waiting already

    @property
    def sent(self) -> Contribution | None:
        """What somebody may have got some of, and an entry of the height to come may list."""
        return self.contribution if self._reached else None

    async def install(self, jump: Callable[[], Awaitable[bool]]) -> None:
        """Run a jump to another state between two entries. Where it returns False nothing has changed."""
        async with self._deciding:
            if await jump():
                await self.replica.sift(self._local)
                await self._leave_round()
                self._leaders.entered(None)
        self.change.notify()

    @property
    def idle(self) -> bool:
        """Whether no round is under way here, nor left undecided."""
        return self.engaged_with is None and self.round is None and self.contribution is None

    @asynccontextmanager
    async def apart(self) -> AsyncIterator[None]:
        """Between two rounds, and no new one for APART_S. Raises Stale where one stays undecided."""
        self._apart_until_s = math.inf
        try:
            limit_s = asyncio.get_running_loop().time() + 4 * self._context.spec.outer.round_deadline_s
            await self.change.until(lambda: self.idle or self.undecided_since_s is not None, lambda: limit_s)
            if not self.idle:
                raise Stale("a round is still to be decided")
            self._apart_until_s = asyncio.get_running_loop().time() + APART_S
            yield
        finally:
            self._apart_until_s = -math.inf

    def gone(self, seat: int) -> None:
        """A seat of the round under way is not there any more."""
        if self.round is not None:
            self.round.mark_gone(seat)

    def disengage(self, leader: PeerId, opening: Prepare) -> None:
        """The stream with a leader is over, in whatever way. What is undecided waits for the next leader."""
        if self.engaged_with != leader or self._engaged_by != (opening.height, opening.ballot):
            return  # it has ended already, with a COMMIT, or its leader has begun another attempt meanwhile
        self.engaged_with = None
        self._leaders.disengage(asyncio.get_running_loop().time())
        if not isinstance(self.round, Round) and self._unapplied is None:
            self._offer(None)  # nothing of it is anywhere; a vain re-entry needs nobody to end it
        elif self.undecided_since_s is None:
            self.undecided_since_s = asyncio.get_running_loop().time()
        self.change.notify()

    # -- for the neighbours' streams

    async def round_named(self, draft: bytes) -> Round:
        """The round under way, if that is its draft; GO gets a moment to arrive. Raises Stale."""
        limit_s = asyncio.get_running_loop().time() + GO_LAG_S

        def here() -> bool:
            return self.round is not None and self.round.id == draft

        await self.change.until(here, lambda: limit_s)
        if not isinstance(self.round, Round) or not here():
            raise Stale(f"no round of draft {draft.hex()[:8]} here")
        return self.round

    def part(self, part: int, digest: bytes) -> Published:
        """A published part that others may fetch. Raises NotHere."""
        found = self.replica.payloads.find(digest) or self.replica.lost.find(digest)
        if found is None and self.round is not None:
            found = self.round.held.get(part)
        if found is None or found.digest != digest:
            raise NotHere(f"part {part} ({digest.hex()[:8]}) is not here")
        return found

    async def close(self) -> None:
        """End what is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.round is not None:
            await self.round.close()


def _codecs(entry: Entry) -> tuple[str, bytes]:
    """What a round's outer steps went by."""
    return entry.published, entry.mix
