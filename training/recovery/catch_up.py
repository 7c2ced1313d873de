"""Catching up: how a joiner, a laggard or a replica on a lost fork reaches the group's head.

Entries first, as bytes, checked as one chain up to a head that live members announce; only then their parts,
by digest from anybody. A snapshot instead where that is less or where entries are gone: it is built beside
the own state, brought to the announced head and root, and only then taken over. Where the chains fork, both
sides compare the same entries, and the one that lost switches. Local steps are kept either way.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import torch

from shoal.protocol.errors import MessageInvalid, NotHere, ProtocolViolation, ShoalError, Stale
from shoal.protocol.identity import PeerId
from shoal.training.outer.ask_around import ask_around, reasons
from shoal.training.outer.codecs import codec_of, round_codecs
from shoal.training.outer.context import Context
from shoal.training.outer.contribution import Contribution
from shoal.training.outer.entry import Entry, parse
from shoal.training.outer.fetch import fetch_parts
from shoal.training.outer.fork import Chain, chain_of, most_tokens, share, wins
from shoal.training.outer.local import LocalWeights, Rebase, Sent
from shoal.training.outer.member import Member
from shoal.training.outer.policy import GroupMember
from shoal.training.outer.replica import Replica
from shoal.training.outer.snapshot import Snapshot
from shoal.training.recovery.chain import Rival, fetch_chain, fetch_entry, find_rival
from shoal.training.recovery.download import Offer, ask_manifest, download
from shoal.training.recovery.policy import Target, choose_target, prefers_snapshot
from shoal.training.recovery.snapshots import Snapshots
from shoal.training.recovery.switch import lost_entries, settlements

_HEADS_REMEMBERED = 1024


class CatchingUp:
    """Belongs to one member; `Outer` calls `run` whenever somebody is on a head that this log lacks."""

    def __init__(self, context: Context, member: Member, local: LocalWeights, snapshots: Snapshots) -> None:
        self._context = context
        self._member = member
        self._local = local
        self._snapshots = snapshots
        self._passed: set[bytes] = set()  # heads on the own chain, or on one that lost against it
        self.entries = 0  # replayed
        self.jumps = 0  # by snapshot
        self.switches = 0  # to a chain that won

    def ahead(self, group: Sequence[GroupMember]) -> list[GroupMember]:
        """Members whose head this peer has to follow, or to compare with its own."""
        return [member for member in group if self._is_elsewhere(member)]

    def _is_elsewhere(self, member: GroupMember) -> bool:
        log = self._member.replica.log
        if member.height == 0 or member.head == log.head or member.head in self._passed:
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
        target = choose_target(group)
        if target is None:
            return
        if target.height > self._member.replica.log.height and await self._follow(target):
            return
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
                    await self._member.commit(data, target.donors)
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
        codec = codec_of(round_codecs(context.spec.compression, target.height, 0.0)[1])
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
            await self._jump(target, rival, mine, theirs)

    async def _compare_totals(self, target: Target, error: NotHere) -> None:
        """Of chains that left each other before all that is kept: which has more tokens since genesis."""
        self._context.event("fork", {"ancestor": None, "why": str(error)})
        log = self._member.replica.log
        if (target.log_tokens, log.head) > (log.tokens, target.head):
            await self._jump(target)
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

    # -- jumping

    async def _jump(
        self,
        target: Target,
        rival: Rival | None = None,
        mine: Chain | None = None,
        theirs: Chain | None = None,
    ) -> None:
        """Build the target's state from a snapshot and its tail, then switch to it."""
        snapshot = await self._snapshot(target, rival)
        shadow = await self._replay(snapshot, target)
        contributed = await self._entry_contributed_to(shadow, target)
        replica = self._member.replica

        async def jump(contribution: Contribution | None) -> bool:
            changes: list[Rebase] = []
            if rival is None or mine is None or theirs is None:
                if shadow.log.height <= replica.log.height:
                    return False  # a COMMIT was faster
            else:
                if replica.log.head != mine.head:
                    return False  # ... and the comparison has to be made again
                lost = lost_entries(replica, shadow.log, rival, mine, theirs)
                changes = settlements(replica, shadow.log, rival, lost)
                replica.lost.rescale(share(mine, theirs))
                replica.lost.add(lost)
                replica.offered.switched()
                self.switches += 1
            listed = self._listed_parts(contributed, contribution)
            round_ = self._member.round
            if contribution is not None and not listed and round_ is not None:
                now_s = asyncio.get_running_loop().time()
                replica.offered.note_open(round_.draft, contribution, now_s)
            if rival is not None:
                own = (replica.log.entry(height) or b"" for height in range(rival.ancestor_height, 0, -1))
                shadow.log.backfill(itertools.chain(reversed(rival.entries), own))
            await replica.adopt(shadow, self._local, contribution, listed, changes)
            self._snapshots.switch(snapshot)
            self._passed.clear()
            self.jumps += 1
            return True

        await self._member.install(jump)

    async def _snapshot(self, target: Target, rival: Rival | None) -> Snapshot:
        """The last snapshot up to the target: an own one where the chains were still one, or the donors'."""
        every = self._context.spec.outer.snapshot_every
        height = target.height // every * every
        common = self._member.replica.log.height if rival is None else rival.ancestor_height
        if height == 0 or height <= common:
            try:
                return self._snapshots.get(height)
            except NotHere as error:
                self._context.event("snapshot-not-kept", {"height": height, "why": str(error)})
        donors, failures = list(target.donors), dict[PeerId, ShoalError]()
        while donors:
            found, silent = await ask_around(
                self._context, donors, lambda donor: self._manifest(donor, height)
            )
            failures |= silent
            if found is None:
                break
            giver, offer = found
            try:
                others = [peer for peer in target.donors if peer != giver]
                return await download(self._context, offer, [giver, *others])
            except ShoalError as error:
                failures[giver] = error
                donors.remove(giver)
                if isinstance(error, ProtocolViolation):
                    self._context.refuse(giver, str(error))
        raise NotHere(f"no donor has the snapshot of height {height}: {reasons(failures)}")

    async def _manifest(self, donor: PeerId, height: int) -> tuple[PeerId, Offer]:
        return donor, await ask_manifest(self._context, donor, height)

    async def _replay(self, snapshot: Snapshot, target: Target) -> Replica:
        """The snapshot with its tail applied, checked against what members announce."""
        shadow = Replica(self._context, snapshot)
        unused = _Nowhere(self._context.size)
        for data in await fetch_chain(self._context, snapshot.height, snapshot.state.head, target):
            parts = await fetch_parts(self._context, parse(data), {}, target.donors)
            await shadow.apply(data, parts, unused, None)
        if shadow.log.head != target.head or shadow.state_root != target.state_root:
            raise MessageInvalid(
                f"head or state root after replay to height {target.height} differ from those announced"
            )
        return shadow

    async def _entry_contributed_to(self, shadow: Replica, target: Target) -> Entry | None:
        """The entry that lists what this process contributed last and saw no COMMIT of, if there is one."""
        round_, context = self._member.round, self._context
        if round_ is None or round_.contribution is None:
            return None
        step, _ = shadow.log.end_of(context.me, context.incarnation, round_.draft.fragment)
        if step < round_.contribution.sent.inner_step:
            return None
        height = round_.draft.height
        data = shadow.log.entry(height)
        entry = parse(data) if data is not None else None
        for donor in target.donors if entry is None else ():
            try:
                entry = await fetch_entry(context, donor, height)
                break
            except ShoalError as error:
                context.event("entry-not-found", {"height": height, "why": str(error)})
        return entry if entry is not None and entry.previous == round_.draft.previous else None

    def _listed_parts(self, entry: Entry | None, mine: Contribution | None) -> set[int]:
        """Parts (by index) of which an entry lists what this process contributed."""
        if entry is None or mine is None:
            return set()
        seat = entry.seat_of(self._context.me, self._context.incarnation)
        row = entry.row_of(seat) if seat is not None else None
        if row is None or row.to_step != mine.sent.inner_step or entry.fragment != mine.fragment.index:
            return set()
        return {mine.fragment.parts[number].index for number in self._member.replica.offered.lists(entry)}


class _Nowhere:
    """Local weights of a shadow replica: there are none."""

    inner_steps = 0
    tokens = 0

    def __init__(self, size: int) -> None:
        self.size = size

    async def sent(self, span: slice, into: torch.Tensor) -> Sent:
        return Sent(torch.empty(0), 0, 0)

    async def rebase(self, changes: Sequence[Rebase]) -> None:
        return None
