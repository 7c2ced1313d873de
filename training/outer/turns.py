"""Turns: one replica's loop of rounds: it opens one, catches up, or waits, as `policy.next_action` says.

Whatever fails is tried again after a random while, longer each time in a row. `Outer` runs it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from shoal.protocol.errors import ShoalError
from shoal.protocol.faults import define
from shoal.protocol.faulty_transport import point
from shoal.protocol.identity import PeerId
from shoal.training.decisions import DecisionLog
from shoal.training.outer.change import Change
from shoal.training.outer.claims import Claims
from shoal.training.outer.context import Context
from shoal.training.outer.entry import Entry
from shoal.training.outer.figures import Figures
from shoal.training.outer.follow import follow
from shoal.training.outer.leader import Leader
from shoal.training.outer.local import LocalWeights
from shoal.training.outer.member import Member
from shoal.training.outer.owners import Owner, Owners
from shoal.training.outer.policy import (
    NO_UPLINK,
    SILENT_S,
    TAKEOVER_S,
    CatchUp,
    GroupMember,
    Lead,
    Position,
    Wait,
    may_leave,
    next_action,
    should_open,
    succession,
)
from shoal.training.outer.promise import Promises
from shoal.training.outer.replica import Replica
from shoal.training.outer.round import Round
from shoal.training.recovery.catch_up import CatchingUp
from shoal.training.recovery.guarded import Guarded
from shoal.training.recovery.policy import choose_target

POLL_S = 0.25  # membership changes and beats are looked at this often
STOOD_STILL_S = 0.25  # a loop that is later than this was stopped, or starved: others may have gone on
BACKOFF_S = (0.2, 5.0)
_ASKING, _GRANTED = define("leave.asking"), define("leave.granted")
_SWITCHER_S = 0.1  # between those who bring lost entries back: others must not always be first


def _never() -> bool:
    return False


class Turns:
    """See the module."""

    def __init__(
        self,
        context: Context,
        replica: Replica,
        member: Member,
        weights: LocalWeights,
        promises: Promises,
        guarded: Guarded,
        catching_up: CatchingUp,
        change: Change,
        figures: Figures,
        *,
        peers: Callable[[], Sequence[GroupMember]],
        first_stage_head: Callable[[], bytes],
        decisions: DecisionLog | None,
    ) -> None:
        self._context = context
        self._replica = replica
        self._member = member
        self._weights = weights
        self._promises = promises
        self._guarded = guarded
        self._catching_up = catching_up
        self._change = change
        self._figures = figures
        self._peers = peers
        self._first_stage_head = first_stage_head
        self._decisions = decisions
        self._wanted_since_s: float | None = None
        self._behind_since_s: float | None = None
        self._not_before_s = 0.0
        self._failures = 0
        self._urgent = False
        self._hurry: Callable[[], bool] = _never  # while it asks to be let go
        self._leading = 0  # the height that this replica conducts a round for
        self._ballot = 0  # the highest met at the height to come
        self._brought_back_by: str | None = None  # who led the last entry, if that was a re-entry
        self._unreached_s: dict[PeerId, float] = {}  # by no attempt at the height to come, since when
        self._departed: set[PeerId] = set()  # those of them that were asked in vain for so long
        self._claims = Claims()
        self._owners = Owners()

    # -- what is due

    @property
    def steps_since_round(self) -> int:
        """Inner steps of this process since the last round that lists it, as far as the next one may."""
        return 0 if self._replica.lost else self._weights.inner_steps - max(self._ends())[0]

    @property
    def tokens_since_round(self) -> int:
        """Tokens of those steps."""
        return self._weights.tokens - max(self._ends())[1]

    @property
    def all_listed(self) -> bool:
        """Whether the log holds every inner step of this process in every fragment."""
        return min(self._ends())[0] >= self._weights.inner_steps

    def _ends(self) -> list[tuple[int, int]]:
        return self._replica.log.ends_of(self._context.me, self._context.incarnation)

    def group(self) -> list[GroupMember]:
        """The live replicas, this one as it is now rather than as its last beat told."""
        return self._group(self._peers())

    def _group(self, peers: Sequence[GroupMember]) -> list[GroupMember]:
        me, log, ends = self._context.me, self._replica.log, self._ends()
        mine = GroupMember(
            peer=me,
            incarnation=self._context.incarnation,
            height=log.height,
            head=log.head,
            state_root=self._replica.state_root,
            steps_since_round=0 if self._replica.lost else self._weights.inner_steps - max(ends)[0],
            tokens_since_round=self._weights.tokens - max(ends)[1],
            log_tokens=log.tokens,
            uplink=next((member.uplink for member in peers if member.peer == me), 1.0),
        )
        silent, departed = self._silent(peers), self._departed
        others = [member for member in peers if member.peer != me and member.peer not in silent]
        return [mine, *[member for member in others if member.heard or member.peer not in departed]]

    def _silent(self, peers: Sequence[GroupMember]) -> set[PeerId]:
        """Who counts for the quorum only."""
        aside = self._claims.aside(asyncio.get_running_loop().time())
        return {member.peer for member in peers if member.silent or member.peer in aside}

    # -- the loop

    async def run(self) -> None:
        """Until cancelled."""
        peers = self._peers()
        while True:
            peers = await self._act(peers)

    def entered(self, entry: Entry) -> None:
        """The log has a new entry: whatever was wanted, or tried, was for the one before."""
        self._wanted_since_s, self._ballot = None, 0
        self._unreached_s.clear()
        self._departed.clear()
        self._claims.next_height()
        if isinstance(round_ := self._member.round, Round):
            self._note_owners(round_.delivered(entry))
        self._brought_back_by = entry.leader if entry.lost else None

    async def final_round(self) -> None:
        """Before a graceful leave: returns when the log holds all inner steps made until now, and the others
        have its last entry: one that is gone with the only COMMIT leaves them to decide anew.

        `run` has to be running; the caller sets the limit.
        """
        loop, steps = asyncio.get_running_loop(), self._weights.inner_steps
        self._urgent = True
        self._change.notify()
        try:
            while min(self._ends())[0] < steps or not self._others_have_the_log():
                await self._change.wait(loop.time() + POLL_S)
        finally:
            self._urgent = False

    def _others_have_the_log(self) -> bool:
        """Whether one of those that are heard has the last entry, or there is nobody else."""
        log, others = self._replica.log, [member for member in self.group()[1:] if member.heard]
        behind = all(other.height <= log.height and other.head != log.head for other in others)
        return self._leading != log.height and not (others and behind)

    async def permission(self, hurry: Callable[[], bool]) -> None:
        """Returns when an entry lets this replica go to another stage (LEAVE, design section 10).

        `hurry`: whether that stage stands still, and so perhaps the steps that would make a round due. `run`
        has to be running; the caller sets the limit, and stays if it cancels.
        """
        context, transport = self._context, self._context.transport
        await point(transport, _ASKING)
        self._member.leaves, self._hurry = True, hurry
        try:
            await self._change.until(
                lambda: self._replica.log.lets_go(context.me, context.incarnation), lambda: None
            )
        finally:
            self._member.leaves, self._hurry = False, _never
        await point(transport, _GRANTED)

    async def _act(self, peers: Sequence[GroupMember]) -> Sequence[GroupMember]:
        """What is due, given what the others say of themselves; what they say afterwards."""
        now_s = asyncio.get_running_loop().time()
        group = self._group(peers)
        self._replica.offered.hear(peers, self._replica.log.head_at, now_s)
        position = self._position(now_s, group)
        action = next_action(position)
        if self._decisions is not None and not isinstance(action, Wait):
            answer = {"action": type(action).__name__, "order": position.order}
            self._decisions.note("lead", answer, stage=self._context.stage, position=position)
        match action:
            case Wait(until_s):
                return await self._wait(peers, until_s if until_s is not None else math.inf)
            case CatchUp():
                await self.catch_up(group)
            case Lead():
                beyond = self._guarded.beyond(self._replica.log.height, now_s)
                if guardians := self._catching_up.ahead(beyond):
                    await self._follow_guardians(guardians)
                else:
                    await self._lead(group, sorted(self._silent(peers)))
        return self._peers()

    async def _wait(self, peers: Sequence[GroupMember], until_s: float) -> Sequence[GroupMember]:
        """Until something changes, be it only what others say of themselves: what they say then.

        Who stood still meanwhile hears what was said before it leads anything.
        """
        loop, hurries, seen = asyncio.get_running_loop(), self._hurry(), peers
        look_s = min(loop.time() + POLL_S, until_s)

        def again_s() -> float | None:
            nonlocal look_s, seen
            now_s, seen = loop.time(), self._peers()
            if now_s >= until_s or now_s - look_s > STOOD_STILL_S:
                return None
            if seen != peers or self._hurry() != hurries:
                return None
            look_s = min(now_s + POLL_S, until_s)
            return look_s

        changed = await self._change.wait(look_s, again_s)
        if (late_s := loop.time() - look_s) > STOOD_STILL_S:
            self._unreached_s = {peer: s + late_s for peer, s in self._unreached_s.items()}
            self._not_before_s = max(self._not_before_s, loop.time() + STOOD_STILL_S)
        return self._peers() if changed else seen

    def _position(self, now_s: float, group: Sequence[GroupMember]) -> Position:
        me, mine = self._context.me, group[0]
        apart = self._context.amended.at(self._replica.log.revision).outer.inner_steps / len(
            self._context.fragments
        )
        due = should_open(apart, mine, group).yes or bool(self._replica.lost)
        urgent = self._urgent and not self.all_listed
        urgent = urgent or (self._hurry() and self._may_go(group))
        series = self._brought_back_by  # whoever brings lost entries back goes on, the others let it
        urgent = urgent or (series == me and bool(self._replica.lost))
        undecided_s = self._member.undecided_since_s
        if undecided_s is None and not due and not urgent:
            self._wanted_since_s = None
        elif self._wanted_since_s is None:
            self._wanted_since_s = now_s
        if not self._catching_up.ahead(group):
            self._behind_since_s = None
        elif self._behind_since_s is None:
            self._behind_since_s = now_s
        wanted_since_s = self._wanted_since_s if undecided_s is None else undecided_s
        if wanted_since_s is not None and series not in (None, me):
            wanted_since_s += TAKEOVER_S
        order = succession(
            self._context.run_id,
            self._context.stage,
            self._replica.log.height + 1,
            [member.peer for member in group],
        )
        return Position(
            now_s=now_s,
            me=me,
            group=group,
            order=order,
            height=self._replica.log.height,
            engaged=self._member.engaged_with is not None,
            behind_since_s=self._behind_since_s,
            wanted_since_s=wanted_since_s,
            not_before_s=self._not_before_s,
            urgent=urgent,
            patience_s=_SWITCHER_S if self._replica.lost and undecided_s is None else TAKEOVER_S,
        )

    def _may_go(self, group: Sequence[GroupMember]) -> bool:
        """Whether a round would let this replica go now: one that refuses helps nobody."""
        context, here = self._context, [member.peer for member in group if member.heard]
        least = context.spec.stages.minimum_replicas
        return bool(may_leave([context.me], here, self._replica.log.leaving, least))

    async def _lead(self, group: Sequence[GroupMember], silent: Sequence[PeerId]) -> None:
        height = self._replica.log.height + 1
        try:
            leader = self._leader(group, silent)
        except ShoalError as error:
            self._back_off(f"round {height} not proposed: {error}")
            return
        self._context.event("round-open", {"height": height, "roster": len(group)})
        self._leading = height
        try:
            await leader.lead()
            self._figures.led += 1
            self._failures = 0
        except ShoalError as error:
            self._ballot = leader.highest_ballot
            self._note_unreached(leader)
            self._note_claims(leader.claimed, group)
            self._note_owners(leader.published)
            self._back_off(f"round {height} not committed: {error}")
        finally:
            self._leading = 0
            self._change.notify()

    def _note_unreached(self, leader: Leader) -> None:
        """Nobody hears of them, so nothing else tells when they have been silent for long enough."""
        now_s = asyncio.get_running_loop().time()
        for peer in leader.reached:
            self._unreached_s.pop(peer, None)
        for peer in leader.unreached:
            if now_s - self._unreached_s.setdefault(peer, now_s) >= SILENT_S:
                self._departed.add(peer)

    def _leader(self, group: Sequence[GroupMember], silent: Sequence[PeerId]) -> Leader:
        """Raises MessageInvalid for an offer that no entry can hold: of a group that is too large, say."""
        promise, log = self._promises.current, self._replica.log
        idle = self._owners.aside(asyncio.get_running_loop().time())
        group = [
            replace(member, uplink=NO_UPLINK) if (member.peer, member.incarnation) in idle else member
            for member in group
        ]
        promised = promise.ballot if promise.previous == log.head else 0
        return Leader(
            self._context,
            log,
            group,
            silent,
            max(promised, self._ballot) + 1,
            self._first_stage_head(),
            lambda line: follow(self._context, self._member, line),
            self._guarded.secure,
            self._replica.lost.next(),
            self._mix(log.height + 1),
        )

    async def catch_up(self, group: Sequence[GroupMember]) -> bool:
        target = choose_target(self._catching_up.ahead(group))
        donors = target.donors if target is not None else ()
        try:
            await self._catching_up.run(group)
            self._failures = 0
            self._claims.kept(donors)
            return True
        except ShoalError as error:
            self._note_claims(donors, group)
            self._back_off(f"not caught up: {error}")
            return False

    async def _follow_guardians(self, guardians: Sequence[GroupMember]) -> None:
        height = self._replica.log.height
        reached = await self.catch_up(guardians)
        self._guarded.followed(guardians, height, reached, asyncio.get_running_loop().time())

    def _note_claims(self, peers: Collection[PeerId], group: Sequence[GroupMember]) -> None:
        """They say that they are ahead, and this peer is still where it was."""
        heard = sum(member.heard for member in group)
        for peer in self._claims.failed(peers, heard, asyncio.get_running_loop().time()):
            self._context.event("set-aside", {"peer": peer, "height": self._replica.log.height})

    def _note_owners(self, published: Mapping[Owner, bool]) -> None:
        for owner in self._owners.note(published, asyncio.get_running_loop().time()):
            self._context.event("owner-set-aside", {"peer": owner.peer, "height": self._replica.log.height})

    def _back_off(self, reason: str) -> None:
        """Wait a random while, longer after each failure in a row."""
        self._failures += 1
        self._figures.failed += 1
        self._figures.last_reason = reason
        self._context.event("outer-retry", {"why": reason})
        low_s, high_s = BACKOFF_S
        longest_s = min(low_s * 2 ** min(self._failures, 8), high_s)
        self._not_before_s = asyncio.get_running_loop().time() + self._context.rng.uniform(low_s, longest_s)

    def _mix(self, height: int) -> bytes:
        """How each part is encoded from here on, where the spec leaves that to measurement."""
        if height <= self._context.spec.compression.warmup_rounds:
            return b""
        return self._member.mixes.get(self._replica.log.next_fragment.index, b"")
