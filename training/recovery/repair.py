"""Repair: a replica whose state is not the others' at the same head puts the parts right that differ.

Heartbeats carry head and state root. Equal heads with different roots mean broken memory or a broken machine
(P1). Who is outvoted asks the others for the digests of all parts, which have to make the root that they
announce, compares them with its own memory, and takes the parts that differ, each checked against its digest.
Where the votes are equal each side replays its own log from the last snapshot that is whole: whoever comes to
another root than its own was wrong, and takes the parts from the replay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.compression.codec import Buffer, bytes_of
from shoal.protocol.errors import MessageInvalid, NotHere, Stale
from shoal.protocol.identity import PeerId
from shoal.protocol.limits import MIB
from shoal.protocol.transport import Channel, call
from shoal.training.outer.apply import PART_STATE_BYTES, part_state, tensors_digest
from shoal.training.outer.ask_around import ask_around, reasons
from shoal.training.outer.context import Context
from shoal.training.outer.local import LocalWeights
from shoal.training.outer.log import state_root
from shoal.training.outer.member import Member
from shoal.training.outer.messages import StateDigests, StatePart, StateRequest
from shoal.training.outer.parts import Part
from shoal.training.outer.policy import GroupMember
from shoal.training.outer.replica import Replica
from shoal.training.recovery.download import DONOR_S, receive_soon
from shoal.training.recovery.policy import Target, dissent
from shoal.training.recovery.shadow import replay
from shoal.training.recovery.snapshots import Snapshots

BATCH = 16  # parts asked for in one stream
_ROOTS_REMEMBERED = 64
State = dict[int, tuple[torch.Tensor, torch.Tensor]]  # part -> anchor and momentum


class Repairing:
    """Belongs to one member's `CatchingUp`."""

    def __init__(self, context: Context, member: Member, local: LocalWeights, snapshots: Snapshots) -> None:
        self._context = context
        self._member = member
        self._local = local
        self._snapshots = snapshots
        self._parts = [part for fragment in context.fragments for part in fragment.parts]
        self._refuted: set[bytes] = set()  # roots that the own log does not lead to
        self.parts = 0  # put right

    def right(self, group: Sequence[GroupMember]) -> Sequence[GroupMember]:
        """Members at the own head whose state is another one, and may be the right one.

        None while a round is undecided: it may be this peer that has to bring it to its end.
        """
        replica = self._member.replica
        found = dissent(replica.log.head, replica.state_root, group)
        if found is None or self._member.undecided_since_s is not None:
            return ()
        return [member for member in found.members if member.state_root not in self._refuted]

    async def run(self, target: Target, group: Sequence[GroupMember]) -> None:
        """Find out who is wrong at the target's head; if it is this peer, put its state right.

        Raises Stale when a round came in between, NotHere when nobody helps.
        """
        replica = self._member.replica
        mine = replica.state_root
        found = dissent(target.head, mine, group)
        self._context.event("state-differs", {"height": target.height, "outvoted": found and found.outvoted})
        shadow = None
        if found is None or not found.outvoted:
            shadow = await self._replayed(target.donors)
            if shadow is not None and shadow.state_root == mine:
                self._refute(target.state_root)
                return
        async with self._member.apart():
            if (replica.log.head, replica.state_root) != (target.head, mine):
                raise Stale("this replica has gone on from the head that was compared")
            own = await replica.hash_anew()
            if shadow is not None:
                digests = await shadow.digests()
                state = {i: shadow.part_state(self._parts[i]) for i in _different(digests, own)}
            else:
                digests = await self._ask_digests(target)
                state = await self._fetch(target, {i: digests[i] for i in _different(digests, own)})
            await self._put_right(target.head, mine, state, digests)

    def _refute(self, root: bytes) -> None:
        if len(self._refuted) >= _ROOTS_REMEMBERED:
            self._refuted.clear()
        self._refuted.add(root)

    async def _replayed(self, donors: Sequence[PeerId]) -> Replica | None:
        """What the own log leads to; None where no snapshot with all entries since is whole."""
        replica = self._member.replica
        log = replica.log
        for height in self._snapshots.heights:
            entries = [log.entry(height) for height in range(height + 1, log.height + 1)]
            chain = [data for data in entries if data is not None]
            if len(chain) < len(entries):
                continue
            try:
                snapshot = await self._snapshots.whole(height)
                return await replay(self._context, snapshot, chain, donors, replica.payloads.parts_at)
            except NotHere as error:
                self._context.event("replay-impossible", {"height": height, "why": str(error)})
        return None

    async def _put_right(self, head: bytes, wrong: bytes, state: State, digests: Sequence[bytes]) -> None:
        replica, member = self._member.replica, self._member

        async def put_right() -> bool:
            if not member.idle or (replica.log.head, replica.state_root) != (head, wrong):
                return False
            await replica.repair(state, digests, self._local)
            if replica.log.height in self._snapshots.heights:  # it was taken of the wrong state
                self._snapshots.take()
            return True

        await member.install(put_right)
        if replica.state_root == wrong:
            raise Stale("a round began before the state was right")
        self.parts += len(state)
        self._context.event("repaired", {"height": replica.log.height, "parts": sorted(state)[:64]})

    # -- from others

    async def _ask_digests(self, target: Target) -> list[bytes]:
        """Of all parts, from a donor whose answer makes the root that it announces. Raises NotHere."""
        context, log_state = self._context, self._member.replica.log.state()

        async def ask(donor: PeerId) -> list[bytes]:
            reply = await call(
                context.transport,
                donor,
                context.method("state"),
                StateRequest(target.head, target.state_root),
                StateDigests,
                timeout_s=DONOR_S,
                max_payload_bytes=PART_STATE_BYTES * len(self._parts),
                channel=Channel.BULK,
            )
            data = bytes(reply.payload)
            digests = [data[i : i + PART_STATE_BYTES] for i in range(0, len(data), PART_STATE_BYTES)]
            if (
                len(data) != PART_STATE_BYTES * len(self._parts)
                or state_root(tensors_digest(digests), log_state) != target.state_root
            ):
                raise MessageInvalid(f"the digests of {donor} do not make the state root that it announces")
            return digests

        found, failures = await ask_around(context, self._shuffled(target.donors), ask)
        if found is None:
            raise NotHere(f"the digests of the state at height {target.height}: {reasons(failures)}")
        return found

    async def _fetch(self, target: Target, wanted: dict[int, bytes]) -> State:
        """Parts by their digests. What one donor owes for a moment another gives, too. Raises NotHere."""
        found: State = {}
        asked: list[int] = []  # of somebody, perhaps of one that stands still

        async def ask(donor: PeerId) -> State:
            while missing := sorted(wanted.keys() - found.keys()):
                batch = [index for index in missing if index not in asked][:BATCH] or missing[:-BATCH:-1]
                asked.extend(batch)
                await self._fetch_from(donor, target, batch, wanted, found)
            return found

        if not wanted:
            return found
        whole, failures = await ask_around(self._context, self._shuffled(target.donors), ask)
        if whole is None:
            raise NotHere(f"{len(wanted) - len(found)} parts of the state: {reasons(failures)}")
        return whole

    async def _fetch_from(
        self, donor: PeerId, target: Target, batch: Sequence[int], wanted: dict[int, bytes], found: State
    ) -> None:
        context = self._context
        async with context.transport.open(donor, context.method("state"), Channel.BULK) as stream:
            await stream.send(StateRequest(target.head, target.state_root, tuple(batch)))
            await stream.end()
            for index in batch:
                part = self._parts[index]
                size = 8 * part.count
                within_s = DONOR_S * max(1.0, size / MIB)
                message = await receive_soon(stream, StatePart, size, within_s)
                if message.header.part != index:
                    raise MessageInvalid(f"part {message.header.part} of {donor} where {index} was due")
                found[index] = await context.offload(_tensors, message.payload, part, wanted[index])

    def _shuffled(self, donors: Sequence[PeerId]) -> list[PeerId]:
        return self._context.rng.sample(donors, len(donors))


def _different(digests: Sequence[bytes], own: Sequence[bytes]) -> list[int]:
    return [index for index, digest in enumerate(digests) if digest != own[index]]


def _tensors(data: Buffer, part: Part, digest: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchor and momentum of a part. Raises MessageInvalid for other bytes than the digest's."""
    view = memoryview(data)
    if view.nbytes != 8 * part.count:
        raise MessageInvalid(f"part {part.index}: {view.nbytes} bytes of state, {8 * part.count} expected")
    anchor, momentum = torch.empty(part.count), torch.empty(part.count)
    for tensor, start in ((anchor, 0), (momentum, 4 * part.count)):
        bytes_of(tensor)[:] = view[start : start + 4 * part.count]
    if part_state(anchor, momentum) != digest:
        raise MessageInvalid(f"part {part.index}: a state that does not fit its digest")
    return anchor, momentum
