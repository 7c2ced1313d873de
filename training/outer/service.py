"""Outer: a replica's whole outer optimisation, as the trainer uses it: serve, recover, run, final_round."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from shoal.protocol.errors import StageEmpty
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.training.amended import Amended
from shoal.training.decisions import DecisionLog
from shoal.training.outer.change import Change
from shoal.training.outer.context import Context, Event, Meet, Offload
from shoal.training.outer.entry import SKIP, Entry, Seat, parse
from shoal.training.outer.figures import Figures
from shoal.training.outer.follow import Services
from shoal.training.outer.leaders import Holds, Leaders
from shoal.training.outer.local import LocalWeights
from shoal.training.outer.log import Rebuilt
from shoal.training.outer.member import Member, Positions
from shoal.training.outer.policy import GroupMember
from shoal.training.outer.promise import Promises
from shoal.training.outer.reduce import Published
from shoal.training.outer.replica import Replica
from shoal.training.outer.snapshot import Inherited, Snapshot, genesis_snapshot
from shoal.training.outer.turns import BACKOFF_S, POLL_S, Turns
from shoal.training.recovery.catch_up import CatchingUp
from shoal.training.recovery.donor import Donor
from shoal.training.recovery.guarded import Guarded
from shoal.training.recovery.residual_file import load_residuals, save_residuals
from shoal.training.recovery.snapshots import Snapshots
from shoal.training.spec import RunSpec

RECOVER_S = 30.0  # without anything from any donor, before the stage counts as empty, ...
RECOVER_TRIES = 3  # ... and at least so many attempts, however long each one takes
_OF_REBUILT = ("height", "policy", "lost_height", "peer")
GUARDIANS_SETTLE_S = 2.5  # a lost replica is noticed within two seconds, and the next beat tells of it

__all__ = ["GroupMember", "Outer"]


class Outer:
    """One replica's rounds, log, anchors, and what it gives to joiners.

    `peers()` are the replicas of the stage, this one among them, and those that fell silent marked so.
    `offload(fn, *args)` runs CPU work off the loop, `disk` large writes. Everything is safe to read at any
    time from the loop.
    """

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        *,
        me: PeerId,
        incarnation: int,
        transport: Transport,
        weights: LocalWeights,
        genesis: torch.Tensor,
        peers: Callable[[], Sequence[GroupMember]],
        suspect: Callable[[PeerId, str], None],
        offload: Offload,
        rng: random.Random,
        disk: Offload | None = None,
        event: Event = lambda kind, data: None,
        positions: Positions = lambda step: (),
        first_stage_head: Callable[[], bytes] = bytes,
        guardians: Callable[[], Sequence[GroupMember]] = tuple,
        directory: Path | None = None,
        inherited: Inherited | None = None,
        decisions: DecisionLog | None = None,
        amended: Amended | None = None,
        meet: Meet | None = None,
        holds: Holds = lambda peer: True,
    ) -> None:
        self.context = self._context = Context.of(
            spec,
            stage,
            weights.size,
            me=me,
            incarnation=incarnation,
            transport=transport,
            offload=offload,
            disk=disk,
            suspect=suspect,
            event=event,
            rng=rng,
            amended=amended,
            meet=meet,
        )
        self._weights = weights
        self._guarded = Guarded(self._context, guardians)
        self._change = Change()
        start = genesis_snapshot(
            self._context.run_id,
            stage,
            genesis.detach().to("cpu", torch.float32),
            self._context.fragments,
            inherited,
        )
        self._replica = Replica(self._context, start)
        self._snapshots = Snapshots(self._context, self._replica, start, directory)
        self._promises = Promises(self._context, self._snapshots.directory, self._snapshots.tell_of_disk)
        leaders = Leaders(self._context, holds, lambda: len(peers()))
        self._member = Member(
            self._context, self._replica, weights, positions, self._change, self._promises, leaders
        )
        self._services = Services(self._context, self._member)
        self._catching_up = CatchingUp(self._context, self._member, weights, self._snapshots)
        self._figures = Figures()
        self._turns = Turns(
            self._context,
            self._replica,
            self._member,
            weights,
            self._promises,
            self._guarded,
            self._catching_up,
            self._change,
            self._figures,
            peers=peers,
            first_stage_head=first_stage_head,
            decisions=decisions,
        )
        self._replica.applied.append(self._on_entry)

    # -- what others read

    @property
    def height(self) -> int:
        """Of the log."""
        return self._replica.log.height

    @property
    def head(self) -> bytes:
        """Hash of the log's last entry."""
        return self._replica.log.head

    @property
    def last_seats(self) -> Sequence[Seat]:
        """Who took part in the last round; after a snapshot only by name."""
        return self._replica.log.seats

    @property
    def tokens(self) -> int:
        """In the log, of all replicas, since genesis."""
        return self._replica.log.tokens

    @property
    def revision(self) -> int:
        """Of the owner's settings, that is in force since the last entry."""
        return self._replica.log.revision

    @property
    def spec(self) -> RunSpec:
        """The spec with those settings: the same for all replicas at the same head."""
        return self._context.amended.at(self.revision)

    @property
    def state_root(self) -> bytes:
        """Hash over the bytes of anchors and outer momentum at the head (P1)."""
        return self._replica.state_root

    @property
    def anchor(self) -> torch.Tensor:
        """The agreed weights [size] fp32 CPU; never changed in place."""
        return self._replica.anchor

    @property
    def momentum(self) -> torch.Tensor:
        """The outer momentum [size] fp32 CPU; never changed in place."""
        return self._replica.momentum

    async def whole_anchor(self) -> tuple[int, torch.Tensor]:
        """Height and agreed weights, put together off the loop if the stage has fragments."""
        height, anchor, _ = await self._replica.whole()
        return height, anchor

    def watch_snapshots(self, kept: Callable[[Snapshot], None]) -> None:
        """`kept` gets each snapshot that is or will be here. All replicas of a stage keep those of the same
        heights."""
        self._snapshots.watch(kept)

    async def snapshot(self) -> Snapshot:
        """The agreed state as it is now, joined off the loop; its tensors are never changed in place."""
        state, root = self._replica.log.state(), self._replica.state_root
        _, anchor, momentum = await self._replica.whole()
        return Snapshot(state, anchor, momentum, root)

    @property
    def steps_since_round(self) -> int:
        """Inner steps of this process since the last round that lists it, as far as the next one may."""
        return self._turns.steps_since_round

    @property
    def tokens_since_round(self) -> int:
        """Tokens of those steps."""
        return self._turns.tokens_since_round

    @property
    def all_listed(self) -> bool:
        """Whether the log holds every inner step of this process in every fragment."""
        return self._turns.all_listed

    @property
    def reentering(self) -> int:
        """Entries of a lost chain that this peer has still to bring back."""
        return len(self._replica.lost)

    @property
    def rebuilt(self) -> Rebuilt | None:
        """The log's first entry, where the stage was lost and rebuilt."""
        return self._replica.log.rebuilt

    def entry(self, height: int) -> Entry | None:
        """An entry of the log that is still kept."""
        data = self._replica.log.entry(height)
        return parse(data) if data is not None else None

    def positions(self) -> dict[int, int]:
        """Samples read of each data stream as far as the log holds them (first stage)."""
        return self._replica.log.positions()

    def readers(self) -> dict[int, PeerId]:
        """Who moved each of those last (first stage)."""
        return self._replica.log.readers()

    def status(self) -> dict[str, object]:
        """Figures for `shoal status`, JSON-able, keys stable."""
        self._figures.refused = {str(peer): count for peer, count in self._context.refused.items()}
        self._figures.caught_up = self._catching_up.entries
        self._figures.switches = self._catching_up.switches
        self._figures.reentering = self.reentering
        self._figures.repaired_parts = self._catching_up.repaired_parts
        snapshot, rebuilt = self._snapshots.newest_height, self.rebuilt
        return {
            **dataclasses.asdict(self._figures),
            "height": self.height,
            "snapshot_height": snapshot,
            "guardians": self._guarded.status(),
            "entries_unguarded": self._guarded.alone,
            "rebuilt": rebuilt and {key: getattr(rebuilt, key) for key in _OF_REBUILT},
        }

    # -- life

    def serve(self) -> None:
        """Register what this replica answers to its group."""
        self._services.serve()
        Donor(self._context, self._replica, self._snapshots).serve()

    async def recover(self) -> None:
        """Before `run`: take up what the own disk has, then what the group has committed.

        Raises StageEmpty when live peers hold state but none hands over any of it for RECOVER_S.
        """
        await self._snapshots.restore(self._weights)
        await self._promises.restore()
        await self.reach()
        await self._restore_residuals()

    async def resume(self, snapshot: Snapshot) -> None:
        """Before `run`, where neither disk nor group had anything: go on from the stage's state elsewhere."""
        await self._replica.adopt(Replica(self._context, snapshot), self._weights)
        self._snapshots.keep(snapshot)

    async def _restore_residuals(self) -> None:
        if self._snapshots.directory is None:
            return
        context, log = self._context, self._replica.log
        found = await context.offload(
            load_residuals,
            self._snapshots.directory,
            context.fragments,
            [log.last_of(context.me, fragment.index) for fragment in context.fragments],
        )
        self._replica.residuals.restore(found)

    async def reach(self) -> None:
        """Before `run`: take up what live replicas have, without any what guardians keep.

        Raises StageEmpty as `recover` does.
        """
        loop = asyncio.get_running_loop()
        limit_s, tries, taken = loop.time() + RECOVER_S, 0, self._catching_up.taken
        while True:
            group = self._turns.group()
            ahead = self._catching_up.ahead(group)
            if not ahead or await self._turns.catch_up(group):
                if sum(member.heard for member in group) == 1:  # records may outlive those they speak of
                    await self._reach_guardians()
                return
            tries += 1
            if self._catching_up.taken > taken:  # the next attempt goes on from there
                limit_s, tries, taken = loop.time() + RECOVER_S, 0, self._catching_up.taken
            if loop.time() >= limit_s and tries >= RECOVER_TRIES:
                raise StageEmpty(
                    f"stage {self._context.stage}: {len(ahead)} replicas are ahead and none of them hands "
                    f"over its state: {self._figures.last_reason}\n"
                    "start this peer again in some minutes; shoal status at another one shows how they fare"
                )
            await asyncio.sleep(self._context.rng.uniform(*BACKOFF_S) / 5)

    async def _reach_guardians(self) -> None:
        """Nobody else holds the stage: whatever of its guardians' copies proves right.

        They may have the last entry and not know yet that nobody will tell that it is committed.
        """
        loop = asyncio.get_running_loop()
        before, looked_at, quiet_since_s = self.height, set[tuple[int, bytes, bytes]](), loop.time()
        while (states := self._guarded.states()) and loop.time() - quiet_since_s < GUARDIANS_SETTLE_S:
            for state, agreeing in states.items():
                if state not in looked_at and self._catching_up.ahead(agreeing):
                    looked_at.add(state)
                    await self._turns.catch_up(agreeing)
                    quiet_since_s = loop.time()
            await asyncio.sleep(POLL_S)
        if self.height > before:
            fields = {"stage": self._context.stage, "height": self.height, "head": self.head.hex()}
            self._context.event("stage-rescued", fields)

    async def run(self) -> None:
        """Open rounds when it is this replica's turn, follow otherwise; until cancelled."""
        try:
            await self._turns.run()
        finally:
            await self.close()

    async def close(self) -> None:
        """End what is under way and finish what is being written; for whoever gives up before `run`, too."""
        await self._services.close()
        await self._member.close()
        await self._snapshots.close()

    def stepped(self) -> None:
        """An inner step was made: a round may be due."""
        self._change.notify()

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Returns when something holds that depends on the log; it is looked at after each change."""
        await self._change.until(holds, lambda: None)

    async def final_round(self) -> None:
        """Before a graceful leave: returns when the log holds all inner steps made until now."""
        await self._turns.final_round()

    async def permission(self, hurry: Callable[[], bool]) -> None:
        """Returns when an entry lets this replica go to another stage; see `Turns`."""
        await self._turns.permission(hurry)

    def _on_entry(self, entry: Entry, data: bytes, parts: Mapping[int, Published]) -> None:
        figures, now_s = self._figures, asyncio.get_running_loop().time()
        figures.rounds += 1
        seat = entry.seat_of(self._context.me, self._context.incarnation)
        listed = seat is not None and entry.row_of(seat) is not None
        figures.listed += int(listed)
        skipped = sum(entry.digest(part) == SKIP for part in range(entry.parts))
        figures.skipped_parts += skipped
        figures.contributors = len(entry.contributors)
        if self._member.round is not None:
            figures.last_round_s = now_s - self._member.round.opened_s
            figures.bytes_out += self._member.round.bytes_out
        if self._member.contribution is not None:
            figures.overlap_steps = self._weights.inner_steps - self._member.contribution.sent.inner_step
        sent = self._member.contribution
        self._turns.entered(entry)
        self._save_residuals(entry, listed)
        self._context.event(
            "round",
            {
                "height": entry.height,
                "seconds": figures.last_round_s,
                "contributors": len(entry.contributors),
                "skipped": skipped,
                "overlap_steps": figures.overlap_steps,
                "fragment": entry.fragment,
                "codecs": [entry.contribution, entry.published],
                "mixed_parts": sum(map(bool, entry.mix)),  # of fewer bits than those
                "bytes_out": self._member.round.bytes_out if self._member.round is not None else 0,
                "tokens": entry.tokens,
                "leader": entry.leader,
                "phases": self._member.phases.applied(),
                **(sent.figures() if sent is not None else {}),
            },
        )

    def _save_residuals(self, entry: Entry, listed: bool) -> None:
        context, fragment = self._context, self._context.fragments[entry.fragment]
        kept = self._replica.residuals.carried(fragment.parts)
        if self._snapshots.directory is not None and listed and kept:
            step, _ = self._replica.log.end_of(context.me, context.incarnation, entry.fragment)
            self._snapshots.write(
                save_residuals, self._snapshots.directory, fragment, kept, context.incarnation, step
            )
