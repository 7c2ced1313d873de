"""Guard: a copy of one stage, kept by a peer that does not train it, in memory and on disk.

It follows the log of the stage's replicas without a vote, with the code by which a laggard catches up, and
serves what donors serve. A lone replica hands it each entry before it commits it: such an entry is taken in
once the replica tells that head, or is gone. `Guarding` owns some of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.dht.beats import StageBeat
from shoal.protocol.errors import Busy, MessageInvalid, ShoalError, Stale
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Stream
from shoal.training.outer.change import Change
from shoal.training.outer.context import GROUP_ROLES, Context
from shoal.training.outer.entry import ENTRY_BYTES, Entry, entry_hash, parse
from shoal.training.outer.fetch import fetch_parts
from shoal.training.outer.follow import Services
from shoal.training.outer.leaders import Leaders
from shoal.training.outer.member import Member
from shoal.training.outer.messages import Keep, Kept
from shoal.training.outer.orders import knows
from shoal.training.outer.policy import GroupMember
from shoal.training.outer.promise import Promises
from shoal.training.outer.reduce import Published
from shoal.training.outer.replica import Replica
from shoal.training.outer.snapshot import Snapshot
from shoal.training.recovery.catch_up import CatchingUp
from shoal.training.recovery.chain import fetch_chain
from shoal.training.recovery.donor import Donor
from shoal.training.recovery.download import Downloads, newest_offer
from shoal.training.recovery.policy import Target
from shoal.training.recovery.shadow import Nowhere
from shoal.training.recovery.snapshots import Snapshots, newest_on_disk, stage_directory

POLL_S = 0.25
_AGAIN_S = (0.5, 2.0)  # after a failure, ...
_AGAIN_MOST = 16.0  # ... times so much after some: a copy must not take the link of those who train
_SERVED = ("manifest", "chunks", "state", "part", "entries", "orders", "keep")


@dataclass(frozen=True, slots=True, eq=False)
class _Handed:
    """An entry that may be committed, by the lone replica that handed it over."""

    data: bytes
    parts: Mapping[int, Published]
    by: PeerId


class Guard:
    """See the module. `run` until cancelled."""

    def __init__(
        self, context: Context, replicas: Callable[[], Sequence[GroupMember]], directory: Path | None
    ) -> None:
        """`context`: this peer's place at the guarded stage; `replicas`: those of it that are alive."""
        self._context = context
        self._replicas = replicas
        self._directory = directory
        self._replica: Replica | None = None  # once there is a copy
        self._downloads = Downloads(context)
        self._lock = asyncio.Lock()
        self._handed: _Handed | None = None
        self.level_since_s: float | None = None  # when the copy first had what the replicas tell

    @property
    def height(self) -> int:
        """Of the copy; 0 while there is none."""
        return self._replica.log.height if self._replica is not None else 0

    def beat(self) -> StageBeat | None:
        """What heartbeats say of the copy."""
        if self._replica is None:
            return None
        log, stage = self._replica.log, self._context.stage
        return StageBeat(
            stage,
            height=log.height,
            head=log.head,
            state_root=self._replica.state_root,
            log_tokens=log.tokens,
        )

    async def run(self) -> None:
        """Fetch a copy, then keep it up to date."""
        context, transport = self._context, self._context.transport
        on_disk = await self._on_disk()
        base = on_disk or await self._fetched()
        self._downloads.forget()
        replica = Replica(context, base)
        snapshots = Snapshots(context, replica, base, self._directory)
        nowhere = Nowhere(context.size)
        nobody = Leaders(context, lambda peer: False, lambda: 0)
        member = Member(context, replica, nowhere, lambda step: (), Change(), Promises(context, None), nobody)
        try:
            if on_disk is None:
                snapshots.keep(base)
            else:
                await snapshots.restore(nowhere)
            self._catching_up = CatchingUp(context, member, nowhere, snapshots)
            self._member, self._nowhere, self._replica = member, nowhere, replica
            Donor(context, replica, snapshots).serve()
            Services(context, member).serve_log()
            transport.serve(context.method("keep"), self._keep, GROUP_ROLES)
            while True:
                await self._follow()
                if self.level_since_s is None and self._is_level():
                    context.event("guarding", {"stage": context.stage, "height": self.height})
                    self.level_since_s = asyncio.get_running_loop().time()
                await asyncio.sleep(POLL_S)
        finally:
            transport.withdraw({context.method(name) for name in _SERVED})
            self._replica = None
            await member.close()
            await snapshots.close()

    async def _on_disk(self) -> Snapshot | None:
        """What an earlier process of this peer left."""
        if self._directory is None:
            return None
        context = self._context
        folder = stage_directory(context, self._directory)
        found: Snapshot | None = await context.offload(
            newest_on_disk, folder, context.size, context.fragments
        )
        return found

    async def _fetched(self) -> Snapshot:
        """A snapshot from the stage's replicas, as soon as there is something to keep."""
        context, failures = self._context, 0
        while True:
            donors = [member.peer for member in self._replicas() if member.height]
            try:
                if donors:
                    return await self._fetch(context.rng.sample(donors, len(donors)))
            except ShoalError as error:
                context.event("guard-retry", {"stage": context.stage, "why": str(error)})
                failures += 1
            await asyncio.sleep(context.rng.uniform(*_AGAIN_S) * min(2.0**failures, _AGAIN_MOST))

    async def _fetch(self, donors: Sequence[PeerId]) -> Snapshot:
        return await self._downloads.run(*await newest_offer(self._context, donors))

    def _is_level(self) -> bool:
        """Whether it has what the replicas tell; before, it may be what the run began with, known to all."""
        return self.height > 0 and not self._catching_up.ahead(self._replicas())

    async def _follow(self) -> None:
        """One look at what the replicas tell."""
        group = self._replicas()
        async with self._lock:
            try:
                if self._handed is not None:
                    await self._settle(self._handed, group)
                if self._catching_up.ahead(group):
                    await self._catching_up.run(group)
                return
            except ShoalError as error:
                self._context.event("guard-retry", {"stage": self._context.stage, "why": str(error)})
        await asyncio.sleep(self._context.rng.uniform(*_AGAIN_S))

    async def _settle(self, handed: _Handed, group: Sequence[GroupMember], previous: bytes = b"") -> None:
        """Take in the entry that was handed over when it is committed, or who would say so is gone.

        `previous`: of an entry that is about to follow.
        """
        replica, head = self._replica, entry_hash(handed.data)
        if replica is None or parse(handed.data).previous != replica.log.head:
            self._handed = None
            return
        told = head == previous or any(member.head == head for member in group)
        if not told and any(member.height > replica.log.height for member in group):
            self._handed = None  # another entry has its place
        elif told or handed.by not in {member.peer for member in group}:
            self._handed = None
            try:
                await replica.apply(handed.data, handed.parts, self._nowhere, None)
            except asyncio.CancelledError:
                self._handed = handed  # not taken in, and perhaps nobody else has it
                raise

    async def _keep(self, stream: Stream) -> None:
        """A lone replica hands over an entry that it is about to commit."""
        data = bytes((await stream.receive(Keep, max_payload_bytes=ENTRY_BYTES)).payload)
        caller, entry, context = stream.remote.peer, parse(data), self._context
        if [entry.roster[seat].peer for seat in entry.present()] != [caller]:
            raise MessageInvalid(f"entry {entry.height} is not of {caller} alone")
        if not await knows(context, entry.revision, [caller]):
            raise Busy(f"revision {entry.revision} of the settings is not known here", retry_after_s=1.0)
        async with self._lock:
            group, replica = self._replicas(), self._replica
            if caller not in {member.peer for member in group} or replica is None:
                raise Stale(f"{caller} is no replica of stage {context.stage}, as far as this guardian knows")
            if self._handed is not None:
                await self._settle(self._handed, group, entry.previous)
            if entry.height > replica.log.height + 1:
                await self._follow_to(entry, caller)
            replica.log.check(entry)
            self._handed = _Handed(data, await fetch_parts(context, entry, {}, [caller]), caller)
        await stream.send(Kept(entry.height, entry_hash(data)))

    async def _follow_to(self, entry: Entry, replica: PeerId) -> None:
        """Up to an entry that a replica has yet to commit: beats come later. Raises Stale and NotHere."""
        log = self._member.replica.log
        target = Target(entry.height - 1, entry.previous, b"", (replica,))
        for data in await fetch_chain(self._context, log.height, log.head, target):
            await self._member.commit(data, (replica,), replayed=True)
