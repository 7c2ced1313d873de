"""Jumping: to another head by a snapshot and its tail, along the own chain or over to one that won."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocol.errors import MessageInvalid, NotHere, ProtocolViolation, ShoalError
from shoal.protocol.identity import PeerId
from shoal.training.outer.ask_around import ask_around, reasons
from shoal.training.outer.context import Context
from shoal.training.outer.contribution import Contribution
from shoal.training.outer.entry import SKIP, Entry, parse
from shoal.training.outer.fork import Chain, share
from shoal.training.outer.local import LocalWeights, Rebase
from shoal.training.outer.member import Member
from shoal.training.outer.policy import SILENT_S
from shoal.training.outer.replica import Replica
from shoal.training.outer.snapshot import Snapshot
from shoal.training.recovery.chain import Rival, fetch_chain, fetch_entry
from shoal.training.recovery.download import Downloads, Offer, ask_manifest
from shoal.training.recovery.policy import Target
from shoal.training.recovery.shadow import replay
from shoal.training.recovery.snapshots import Snapshots
from shoal.training.recovery.switch import lost_entries, settlements


@dataclass(frozen=True, slots=True)
class Fork:
    """What made the own chain lose."""

    rival: Rival
    mine: Chain
    theirs: Chain


class Jumping:
    """Belongs to one member's `CatchingUp`."""

    def __init__(self, context: Context, member: Member, local: LocalWeights, snapshots: Snapshots) -> None:
        self._context = context
        self._member = member
        self._local = local
        self._snapshots = snapshots
        self._not_found = (b"", 0.0)  # the draft whose entry nobody had, and since when
        self.downloads = Downloads(context)

    async def run(self, target: Target, fork: Fork | None, *, leaves: bool = False) -> bool:
        """Build the target's state and take it over. False where the own log has gone on meanwhile.

        `fork` where the target is on another chain; `leaves` where it is and nobody knows where both parted:
        then no snapshot of one's own is of that chain, and it may be the lower one. Raises NotHere,
        MessageInvalid and what donors raise.
        """
        begun = self._member.replica.log.head
        common = self._member.replica.log.height if fork is None else fork.rival.ancestor_height
        snapshot = await self._snapshot(target, 0 if leaves else common)
        shadow = await self._replay(snapshot, target)
        passed = await self._passed(shadow, target, fork)
        self._require_listing(shadow, passed)
        replica, jumped = self._member.replica, False

        async def jump() -> bool:
            nonlocal jumped
            changes: list[Rebase] = []
            round_, sent = self._member.round, self._member.sent
            listed = self._listed_parts(shadow, passed)
            if leaves:
                if replica.log.head != begun:
                    return False  # the comparison has to be made again
                self._tell_of_lost_steps(replica, shadow)
                settled = sent.fragment.index if sent is not None and listed else None
                changes = replica.offered.found(shadow.log, passed, settled)
            elif fork is None:
                on_the_way = replica.log.head in (begun, shadow.log.head_at(replica.log.height))
                if shadow.log.height <= replica.log.height or not on_the_way:
                    return False  # a COMMIT was faster; one of another chain has to be left in order
                changes = [c for e in passed if e.height > replica.log.height for c in replica.pass_by(e)]
            elif replica.log.head != fork.mine.head:
                return False  # as above
            else:
                changes = self._leave_chain(shadow, fork)
            if sent is not None and not listed and round_ is not None:
                replica.offered.note_open(round_.draft, sent, asyncio.get_running_loop().time())
            if fork is not None:
                ancestor = fork.rival.ancestor_height
                own = (replica.log.entry(height) or b"" for height in range(ancestor, 0, -1))
                shadow.log.backfill(itertools.chain(reversed(fork.rival.entries), own))
            await replica.adopt(shadow, self._local, sent, listed, changes)
            self._snapshots.switch(snapshot)
            jumped = True
            return True

        await self._member.install(jump)
        return jumped

    def _tell_of_lost_steps(self, replica: Replica, shadow: Replica) -> None:
        """Own steps in the chain that is left: its anchors go, nobody knows since when, and nothing brings
        them back. Later contributions name them as well, since steps tile, with no delta in them."""
        me, context = (self._context.me, self._context.incarnation), self._context
        ends = zip(replica.log.ends_of(*me), shadow.log.ends_of(*me), strict=True)
        steps = max(old[0] - new[0] for old, new in ends)
        if steps > 0:
            text = f"{steps} inner steps of this peer were in a chain that has lost, and are gone with it"
            context.event("steps-lost", {"stage": context.stage, "steps": steps, "text": text})

    def _leave_chain(self, shadow: Replica, fork: Fork) -> list[Rebase]:
        """What stays behind waits to re-enter; what the switch means for local weights."""
        replica = self._member.replica
        lost = lost_entries(replica, shadow.log, fork.rival, fork.mine, fork.theirs)
        changes = settlements(replica, shadow.log, fork.rival, lost)
        replica.lost.rescale(share(fork.mine, fork.theirs))
        replica.lost.add(lost, asyncio.get_running_loop().time())
        replica.offered.switched()
        return changes

    async def _snapshot(self, target: Target, common: int) -> Snapshot:
        """The last snapshot up to the target: an own one up to the last `common` height, or the donors'."""
        every = self._context.spec.outer.snapshot_every
        height = target.height // every * every
        if height == 0 or height <= common:
            try:
                return await self._snapshots.whole(height)
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
                return await self.downloads.run(offer, [giver, *others])
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
        chain = await fetch_chain(self._context, snapshot.height, snapshot.state.head, target)
        shadow = await replay(self._context, snapshot, chain, target.donors)
        if shadow.log.head != target.head or shadow.state_root != target.state_root:
            raise MessageInvalid(
                f"head or state root after replay to height {target.height} differ from those announced"
            )
        return shadow

    async def _passed(self, shadow: Replica, target: Target, fork: Fork | None) -> list[Entry]:
        """The entries from the last common one to the target, as far as donors tell and it matters here.

        They may list what this process contributed last and saw no COMMIT of, be it as a re-entry, or what it
        offered to a round of a chain that it has left.
        """
        replica, round_ = self._member.replica, self._member.round
        known: Sequence[bytes] = ()
        if fork is not None:
            known = fork.rival.entries
        elif round_ is not None or len(replica.lost) or len(replica.offered):
            known = await self._entries_from(replica.log.height + 1, target)
        heights = range(replica.log.height + 1, shadow.log.height + 1)
        tail = (data for height in heights if (data := shadow.log.entry(height)) is not None)
        return [parse(data) for data in dict.fromkeys((*known, *tail))]

    async def _entries_from(self, height: int, target: Target) -> Sequence[bytes]:
        """Of the own chain up to the target, as far as donors have them: all, or only the first."""
        log = self._member.replica.log
        try:
            return await fetch_chain(self._context, log.height, log.head, target)
        except ShoalError as error:
            self._context.event("entry-not-found", {"height": height, "why": str(error)})
        found, failures = await ask_around(
            self._context, target.donors, lambda donor: fetch_entry(self._context, donor, height)
        )
        if found is None:
            self._context.event("entry-not-found", {"height": height, "why": reasons(failures)})
        return [found.encode()] if found is not None else ()

    def _require_listing(self, shadow: Replica, passed: Sequence[Entry]) -> None:
        """Raises NotHere where the donors came by a snapshot themselves, and know less than its log tells:
        that it holds what this process contributed last, but not which parts.

        Others who were there may be heard again; nobody waits for ever.
        """
        round_ = self._member.round
        if round_ is None or not self._is_untold(shadow, passed):
            return
        now_s = asyncio.get_running_loop().time()
        if self._not_found[0] != round_.id:
            self._not_found = (round_.id, now_s)
        if now_s - self._not_found[1] < SILENT_S:
            raise NotHere(
                f"entry {round_.draft.height}, which lists this peer, is with nobody that can be asked"
            )
        self._context.event("listing-unknown", {"height": round_.draft.height})

    def _is_untold(self, shadow: Replica, passed: Sequence[Entry]) -> bool:
        """Whether the log holds the steps that were contributed last, and no entry here says where."""
        context, mine = self._context, self._member.sent
        if mine is None:
            return False
        fragment = mine.fragment.index
        step, _ = shadow.log.end_of(context.me, context.incarnation, fragment)
        told = (self._lists(entry, mine) for entry in passed if entry.fragment == fragment)
        return step >= mine.sent.inner_step and not any(told)

    def _listed_parts(self, shadow: Replica, passed: Sequence[Entry]) -> set[int]:
        """Parts (by index) that hold what this process contributed last, by some of the entries.

        Where nobody can tell which, all: who lists a process lists nearly always all that it sent, and what
        was not is missed once; taken for not listed, all of it would be in twice.
        """
        round_, mine = self._member.round, self._member.sent
        if round_ is None or mine is None:
            return set()
        if self._is_untold(shadow, passed):
            return {part.index for part in mine.fragment.parts}
        after = (entry for entry in passed if entry.source().previous == round_.draft.previous)
        numbers = {number for entry in after for number in self._lists(entry, mine)}
        return {mine.fragment.parts[number].index for number in numbers}

    def _lists(self, entry: Entry, mine: Contribution) -> set[int]:
        """Parts (by number) of which an entry, or what it brings back, lists a process up to that step."""
        source, context = entry.source(), self._context
        seat = source.seat_of(context.me, context.incarnation)
        row = source.row_of(seat) if seat is not None else None
        if row is None or row.to_step != mine.sent.inner_step or source.fragment != mine.fragment.index:
            return set()
        numbers = self._member.replica.offered.lists(source)
        return {number for number in numbers if entry.digest(number) != SKIP}
