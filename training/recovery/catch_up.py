"""Catching up: how a joiner, a laggard or a replica on a lost fork reaches the group's head.

Entries first, as bytes, checked as one chain up to a head that live members announce; only then their parts,
by digest from anybody. A snapshot instead where that is less, where entries are gone, or where the own chain
forked off: it is built beside the own state, brought to the announced head and root, and only then
taken over. Local steps are kept either way, by the rebase rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.protocol.errors import MessageInvalid, NetworkError, NotHere, ProtocolViolation, ShoalError, Stale
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Channel
from shoal.training.outer.codecs import codec_of, round_codecs
from shoal.training.outer.context import Context
from shoal.training.outer.contribution import Contribution
from shoal.training.outer.entry import ENTRY_BYTES, Entry, entry_hash, parse, seats_in
from shoal.training.outer.fetch import fetch_parts
from shoal.training.outer.local import LocalWeights, Rebase, Sent
from shoal.training.outer.member import Member
from shoal.training.outer.messages import EntriesRequest, EntryItem
from shoal.training.outer.policy import GroupMember
from shoal.training.outer.replica import Replica
from shoal.training.outer.snapshot import Snapshot
from shoal.training.recovery.download import ask_manifest, download, receive_soon
from shoal.training.recovery.policy import Target, choose_target, prefers_snapshot
from shoal.training.recovery.snapshots import Snapshots


class CatchingUp:
    """Belongs to one member; `run` is called by `Outer` whenever somebody is ahead."""

    def __init__(self, context: Context, member: Member, local: LocalWeights, snapshots: Snapshots) -> None:
        self._context = context
        self._member = member
        self._local = local
        self._snapshots = snapshots
        self.entries = 0  # replayed
        self.jumps = 0  # by snapshot

    async def run(self, group: Sequence[GroupMember]) -> None:
        """Reach a state that members of the group announce. Raises ShoalError when nobody helps."""
        log = self._member.replica.log
        target = choose_target(log.height, group)
        if target is None:
            return
        if not self._prefers_snapshot(target):
            try:
                chain = await self._chain(log.height, log.head, target)
                for data in chain:
                    await self._member.commit(data, target.donors)
                    self.entries += 1
                return
            except (NotHere, Stale) as error:  # of those that answered; silent ones are the next attempt's
                self._context.event("replay-impossible", {"height": log.height, "why": str(error)})
        await self._jump(target)

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

    async def _chain(self, height: int, head: bytes, target: Target) -> list[bytes]:
        """The entries from `height` to the target, checked link by link. Raises Stale where they fork."""
        failed: ShoalError = NotHere(f"entries {height + 1}-{target.height}: nobody to ask")
        for donor in target.donors:
            try:
                return await self._chain_from(donor, height, head, target)
            except ProtocolViolation as error:
                self._context.refuse(donor, str(error))
                failed = error
            except ShoalError as error:
                # An answer counts for more than silence: it says whether a snapshot is needed.
                failed = failed if isinstance(failed, Stale) and isinstance(error, NetworkError) else error
        raise failed

    async def _chain_from(self, donor: PeerId, height: int, head: bytes, target: Target) -> list[bytes]:
        chain: list[bytes] = []
        async with self._context.transport.open(
            donor, self._context.method("entries"), Channel.BULK
        ) as stream:
            await stream.send(EntriesRequest(height + 1, target.height))
            await stream.end()
            for expected in range(height + 1, target.height + 1):
                data = bytes((await receive_soon(stream, EntryItem, ENTRY_BYTES)).payload)
                entry = parse(data)
                if entry.height != expected:
                    raise MessageInvalid(f"entry {entry.height} of {donor} where {expected} was due")
                if entry.previous != head:
                    raise Stale(f"entry {expected} of {donor} does not follow head {head.hex()[:8]}: a fork")
                head = entry_hash(data)
                chain.append(data)
        if head != target.head:
            raise MessageInvalid(f"the chain of {donor} does not end at the head that members announce")
        return chain

    async def _jump(self, target: Target) -> None:
        """Build the target's state from a snapshot and its tail, then switch to it."""
        snapshot = await self._snapshot(target)
        shadow = await self._replay(snapshot, target)
        contributed = await self._entry_contributed_to(shadow, target)
        member = self._member

        async def jump(mine: Contribution | None) -> None:
            if shadow.log.height > member.replica.log.height:  # else a COMMIT was faster
                listed = _listed_parts(contributed, self._context, mine)
                await member.replica.adopt(shadow, self._local, mine, listed)
                self._snapshots.switch(snapshot)
                self.jumps += 1

        await member.install(jump)

    async def _snapshot(self, target: Target) -> Snapshot:
        """The last snapshot up to the target, from the donors; genesis is here while it may be needed."""
        every = self._context.spec.outer.snapshot_every
        height = target.height // every * every
        if height == 0:
            return self._snapshots.get(0)
        reasons = []
        for donor in target.donors:
            try:
                offer = await ask_manifest(self._context, donor, height)
                others = [peer for peer in target.donors if peer != donor]
                return await download(self._context, offer, [donor, *others])
            except ProtocolViolation as error:
                self._context.refuse(donor, str(error))
                reasons.append(f"{donor}: {error}")
            except ShoalError as error:
                reasons.append(f"{donor}: {error}")
        raise NotHere(f"no donor has the snapshot of height {height}: {'; '.join(reasons[:4])}")

    async def _replay(self, snapshot: Snapshot, target: Target) -> Replica:
        """The snapshot with its tail applied, checked against what members announce."""
        shadow = Replica(self._context, snapshot)
        unused = _Nowhere(self._context.size)
        for data in await self._chain(snapshot.height, snapshot.state.head, target):
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
        if step != round_.contribution.sent.inner_step:
            return None
        height = round_.draft.height
        data = shadow.log.entry(height)
        if data is not None:
            return parse(data)
        for donor in target.donors:
            try:
                return parse(await self._one_entry(donor, height))
            except ShoalError as error:
                context.event("entry-not-found", {"height": height, "why": str(error)})
        return None

    async def _one_entry(self, donor: PeerId, height: int) -> bytes:
        method = self._context.method("entries")
        async with self._context.transport.open(donor, method, Channel.BULK) as stream:
            await stream.send(EntriesRequest(height, height))
            await stream.end()
            return bytes((await receive_soon(stream, EntryItem, ENTRY_BYTES)).payload)


def _listed_parts(entry: Entry | None, context: Context, mine: Contribution | None) -> set[int]:
    """Parts (by index) of which an entry lists what this process contributed."""
    if entry is None or mine is None:
        return set()
    seat = entry.seat_of(context.me, context.incarnation)
    row = entry.row_of(seat) if seat is not None else None
    if row is None or row.to_step != mine.sent.inner_step or entry.fragment != mine.fragment.index:
        return set()
    return {
        part.index
        for number, part in enumerate(mine.fragment.parts)
        if seat in seats_in(entry.listed_in(number))
    }


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
