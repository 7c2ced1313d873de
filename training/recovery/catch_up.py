"""Catching up: how a joiner, a laggard or a replica on a lost fork reaches the group's head.

Entries first, as bytes, checked as one chain up to a head that live members announce; only then their parts,
by digest from anybody. A snapshot instead where that is less or where entries are gone (`jump`). Where the
chains fork, both sides compare the same entries, and the one that lost switches. Where the heads are equal
and the states are not, `repair`. Local steps are kept in any case.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.protocol.errors import NotHere, Stale
from shoal.training.outer.ask_around import ask_around, reasons
from shoal.training.outer.codecs import codec_of, usual_codecs
from shoal.training.outer.context import Context
from shoal.training.outer.entry import parse
from shoal.training.outer.fork import Chain, chain_of, most_tokens, wins
from shoal.training.outer.local import LocalWeights
from shoal.training.outer.member import Member
from shoal.training.outer.policy import GroupMember
from shoal.training.recovery.chain import Rival, fetch_chain, fetch_entry, find_rival
from shoal.training.recovery.jump import Fork, Jumping
from shoal.training.recovery.policy import Target, choose_target, prefers_snapshot
from shoal.training.recovery.repair import Repairing
from shoal.training.recovery.snapshots import Snapshots

_HEADS_REMEMBERED = 1024


class CatchingUp:
    """Belongs to one member; `Outer` calls `run` whenever `ahead` names somebody."""

    def __init__(self, context: Context, member: Member, local: LocalWeights, snapshots: Snapshots) -> None:
        self._context = context
        self._member = member
        self._jumping = Jumping(context, member, local, snapshots)
        self._repairing = Repairing(context, member, local, snapshots)
        self._passed: set[bytes] = set()  # heads on the own chain, or on one that lost against it
        self.entries = 0  # replayed
        self.switches = 0  # to a chain that won

    @property
    def repaired_parts(self) -> int:
        """Whose state was wrong here, and is right now."""
        return self._repairing.parts

    @property
    def taken(self) -> int:
        """Entries and pieces of snapshots that have come; it grows as long as donors help."""
        return self.entries + self._jumping.downloads.chunks

    def ahead(self, group: Sequence[GroupMember]) -> Sequence[GroupMember]:
        """Members whose head this peer has to follow, or to compare with its own; where there are none, those
        at its own head who may be right about the state when it is wrong."""
        head = self._member.replica.log.head
        elsewhere = [member for member in group if member.head != head and self._is_elsewhere(member)]
        if not elsewhere:
            self._jumping.downloads.forget()
        return elsewhere or self._repairing.right(group)

    def _is_elsewhere(self, member: GroupMember) -> bool:
        log = self._member.replica.log
        if member.height == 0 or member.head in self._passed:
            return False
        if member.height > log.height:
            return True
        known = log.head_at(member.height)
        if known in (None, member.head):  # it is behind (None: so far that only it can tell)
            self._pass(member.head)
            return False
        return True

    def _pass(self, head: bytes) -> None:
        if len(self._passed) >= _HEADS_REMEMBERED:
            self._passed.clear()
        self._passed.add(head)

    async def run(self, group: Sequence[GroupMember]) -> None:
        """Reach a state that members of `ahead` announce. Raises ShoalError when nobody helps."""
        target = choose_target(self.ahead(group))
        if target is None:
            return
        if target.head == self._member.replica.log.head:
            await self._repairing.run(target, group)
        elif target.height <= self._member.replica.log.height or not await self._follow(target):
            await self._compare(target)

    # -- the same chain

    async def _follow(self, target: Target) -> bool:
        """Replay, or jump along the own chain. False where the target's is another."""
        log = self._member.replica.log
        known = log.height == 0  # that the target's chain goes on from here
        if not self._prefers_snapshot(target):
            try:
                chain = await fetch_chain(self._context, log.height, log.head, target)
                known = True
                for data in chain:
                    await self._member.commit(data, target.donors, replayed=True)
                    self.entries += 1
                return True
            except Stale as error:
                self._context.event("replay-impossible", {"height": log.height, "why": str(error)})
                return False
            except NotHere as error:  # of those that answered; silent ones are the next attempt's
                self._context.event("replay-impossible", {"height": log.height, "why": str(error)})
        if not known and not await self._is_continued_by(target):
            return False
        await self._jump(target)
        return True

    async def _jump(self, target: Target, fork: Fork | None = None, *, leaves: bool = False) -> None:
        if await self._jumping.run(target, fork, leaves=leaves):
            self._passed.clear()
            self.switches += leaves or fork is not None

    async def _is_continued_by(self, target: Target) -> bool:
        """Whether the target's chain goes on from the own head; False, too, where no donor can tell."""
        log = self._member.replica.log
        found, failures = await ask_around(
            self._context, target.donors, lambda donor: fetch_entry(self._context, donor, log.height + 1)
        )
        if found is None:
            self._context.event("entry-not-found", {"height": log.height + 1, "why": reasons(failures)})
        return found is not None and found.previous == log.head

    def _prefers_snapshot(self, target: Target) -> bool:
        context = self._context
        codec = codec_of(usual_codecs(context.spec.compression)[1])
        published = sum(codec.encoded_bytes(part.count) for part in context.fragments[0].parts)
        return prefers_snapshot(
            self._member.replica.log.height,
            target.height,
            context.spec.outer.snapshot_every,
            4 * context.size,
            published,
        )

    # -- another chain

    async def _compare(self, target: Target) -> None:
        """Switch to the target's chain if it wins against the own one."""
        log, spec = self._member.replica.log, self._context.spec
        try:
            rival = await find_rival(self._context, log, target)
        except NotHere as error:
            await self._compare_totals(target, error)
            return
        if not rival.extends:
            self._pass(target.head)
            return
        own = [parse(log.entry(h) or b"") for h in range(rival.ancestor_height + 1, log.height + 1)]
        most = most_tokens(spec.outer.inner_steps, spec.inner.inner_tokens)
        mine = chain_of(log.head, log.height, own, most)
        theirs = chain_of(target.head, target.height, [parse(data) for data in rival.entries], most)
        self._tell_of(rival, mine, theirs)
        if wins(mine, theirs):
            self._pass(target.head)
        else:
            await self._jump(target, Fork(rival, mine, theirs))

    async def _compare_totals(self, target: Target, error: NotHere) -> None:
        """Of chains that left each other before all that is kept: which has more tokens since genesis."""
        self._context.event("fork", {"ancestor": None, "why": str(error)})
        log = self._member.replica.log
        if (target.log_tokens, log.head) > (log.tokens, target.head):
            await self._jump(target, leaves=True)
        else:
            self._pass(target.head)

    def _tell_of(self, rival: Rival, mine: Chain, theirs: Chain) -> None:
        self._context.event(
            "fork",
            {
                "ancestor": rival.ancestor_height,
                "heights": [mine.height, theirs.height],
                "tokens": [mine.work_tokens, theirs.work_tokens],
                "won": wins(mine, theirs),
            },
        )
