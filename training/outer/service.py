"""Outer: a replica's whole outer optimisation, as the trainer uses it: serve, recover, run, final_round."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shoal.protocol.errors import ShoalError, StageEmpty
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.training.amended import Amended
from shoal.training.decisions import DecisionLog
from shoal.training.outer.change import Change
from shoal.training.outer.context import Context, Event, Offload
from shoal.training.outer.entry import SKIP, Entry, parse
from shoal.training.outer.follow import Services, follow
from shoal.training.outer.leader import Leader
from shoal.training.outer.local import LocalWeights
from shoal.training.outer.member import Member, Positions
from shoal.training.outer.policy import (
    TAKEOVER_S,
    CatchUp,
    GroupMember,
    Lead,
    Position,
    Wait,
    next_action,
    should_open,
    succession,
)
from shoal.training.outer.promise import Promises
from shoal.training.outer.reduce import Published
from shoal.training.outer.replica import Replica
from shoal.training.outer.snapshot import Inherited, Snapshot, genesis_snapshot
from shoal.training.recovery.catch_up import CatchingUp
from shoal.training.recovery.donor import Donor
from shoal.training.recovery.guarded import Guarded
from shoal.training.recovery.residual_file import load_residuals, save_residuals
from shoal.training.recovery.snapshots import Snapshots
from shoal.training.spec import RunSpec

POLL_S = 0.25  # membership changes and beats are looked at this often
STOOD_STILL_S = 0.25  # a loop that is later than this was stopped, or starved: others may have gone on
RECOVER_S = 30.0  # to find a donor that answers, before the stage counts as empty
GUARDIANS_SETTLE_S = 2.5  # a lost replica is noticed within two seconds, and the next beat tells of it
_BACKOFF_S = (0.2, 5.0)
_SWITCHER_S = 0.1  # between those who bring lost entries back: others must not always be first

__all__ = ["GroupMember", "Outer"]


@dataclass(slots=True)
class Figures:
    """Counters for status."""

    rounds: int = 0
    led: int = 0
    failed: int = 0
    caught_up: int = 0
    switches: int = 0  # of chains, after a fork
    reentering: int = 0  # lost entries still to bring back
    repaired_parts: int = 0  # whose state was another than the group's at the same head
    listed: int = 0
    skipped_parts: int = 0
    last_round_s: float = 0.0
    overlap_steps: int = 0  # made here while the last round was under way
    bytes_out: int = 0
    contributors: int = 0
    last_reason: str = ""
    refused: dict[str, int] = field(default_factory=dict)


class Outer:
    """One replica's rounds, log, anchors, and what it gives to joiners.

    `peers()` are the replicas of the stage, this one among them, and those that fell silent marked so.
    `offload(fn, *args)` runs CPU work off the loop. Everything is safe to read at any time from the loop.
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
        event: Event = lambda kind, data: None,
        positions: Positions = lambda step: (),
        first_stage_head: Callable[[], bytes] = bytes,
        guardians: Callable[[], Sequence[GroupMember]] = tuple,
        directory: Path | None = None,
        inherited: Inherited | None = None,
        decisions: DecisionLog | None = None,
        amended: Amended | None = None,
    ) -> None:
        self._decisions = decisions
        self.context = self._context = Context.of(
            spec,
            stage,
            weights.size,
            me=me,
            incarnation=incarnation,
            transport=transport,
            offload=offload,
            suspect=suspect,
            event=event,
            rng=rng,
            amended=amended,
        )
        self._weights = weights
        self._peers = peers
        self._guarded = Guarded(self._context, guardians)
        self._first_stage_head = first_stage_head
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
        self._promises = Promises(self._context, self._snapshots.directory)
        self._member = Member(self._context, self._replica, weights, positions, self._change, self._promises)
        self._catching_up = CatchingUp(self._context, self._member, weights, self._snapshots)
        self._figures = Figures()
        self._wanted_since_s: float | None = None
        self._behind_since_s: float | None = None
        self._not_before_s = 0.0
        self._failures = 0
        self._urgent = False
        self._ballot = 0  # the highest met at the height to come
        self._brought_back_by: str | None = None  # who led the last entry, if that was a re-entry
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

    def watch_snapshots(self, kept: Callable[[Snapshot], None]) -> None:
        """`kept` gets each snapshot that is or will be here. All replicas of a stage keep those of the same
        heights."""
        self._snapshots.watch(kept)

    async def snapshot(self) -> Snapshot:
        """The agreed state as it is now, joined off the loop; its tensors are never changed in place."""
        state, root, pieces = self._replica.log.state(), self._replica.state_root, self._replica.pieces()
        if len(pieces[0]) == 1:
            return Snapshot(state, pieces[0][0], pieces[1][0], root)
        anchor, momentum = [await self._context.offload(torch.cat, piece) for piece in pieces]
        return Snapshot(state, anchor, momentum, root)

    @property
    def steps_since_round(self) -> int:
        """Inner steps of this process since the last round that lists it, as far as the next one may."""
        return 0 if self.reentering else self._weights.inner_steps - max(self._ends())[0]

    @property
    def tokens_since_round(self) -> int:
        """Tokens of those steps."""
        return self._weights.tokens - max(self._ends())[1]

    @property
    def all_listed(self) -> bool:
        """Whether the log holds every inner step of this process in every fragment."""
        return min(self._ends())[0] >= self._weights.inner_steps

    @property
    def reentering(self) -> int:
        """Entries of a lost chain that this peer has still to bring back."""
        return len(self._replica.lost)

    def entry(self, height: int) -> Entry | None:
        """An entry of the log that is still kept."""
        data = self._replica.log.entry(height)
        return parse(data) if data is not None else None

    def positions(self) -> dict[int, int]:
        """Samples read of each data stream as far as the log holds them (first stage)."""
        return self._replica.log.positions()

    def status(self) -> dict[str, object]:
        """Figures for `shoal status`, JSON-able, keys stable."""
        self._figures.refused = {str(peer): count for peer, count in self._context.refused.items()}
        self._figures.caught_up = self._catching_up.entries
        self._figures.switches = self._catching_up.switches
        self._figures.reentering = self.reentering
        self._figures.repaired_parts = self._catching_up.repaired_parts
        snapshot = self._snapshots.newest_height
        return {
            **dataclasses.asdict(self._figures),
            "height": self.height,
            "snapshot_height": snapshot,
            "guardians": self._guarded.status(),
            "entries_unguarded": self._guarded.alone,
        }

    # -- life

    def serve(self) -> None:
        """Register what this replica answers to its group."""
        Services(self._context, self._member).serve()
        Donor(self._context, self._replica, self._snapshots).serve()

    async def recover(self) -> None:
        """Before `run`: take up what the own disk has, then what the group has committed.

        Raises StageEmpty when live peers hold state but none hands it over within RECOVER_S.
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
            lambda incarnation, fragment: log.end_of(context.me, incarnation, fragment)[0],
        )
        self._replica.residuals.restore(found)

    async def reach(self) -> None:
        """Before `run`: take up what live replicas have, without any what guardians keep.

        Raises StageEmpty as `recover` does.
        """
        loop = asyncio.get_running_loop()
        limit_s = loop.time() + RECOVER_S
        while True:
            group = self._group(self._peers())
            ahead = self._catching_up.ahead(group)
            if not ahead or await self._catch_up(group):
                if len(group) == 1:
                    await self._reach_guardians()
                return
            if loop.time() >= limit_s:
                raise StageEmpty(
                    f"stage {self._context.stage}: {len(ahead)} replicas are ahead and none of them hands "
                    f"over its state: {self._figures.last_reason}"
                )
            await asyncio.sleep(self._context.rng.uniform(*_BACKOFF_S) / 5)

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
                    await self._catch_up(agreeing)
                    quiet_since_s = loop.time()
            await asyncio.sleep(POLL_S)
        if self.height > before:
            fields = {"stage": self._context.stage, "height": self.height, "head": self.head.hex()}
            self._context.event("stage-rescued", fields)

    async def run(self) -> None:
        """Open rounds when it is this replica's turn, follow otherwise; until cancelled."""
        try:
            while True:
                await self._act()
        finally:
            await self._member.close()
            await self._snapshots.close()

    def stepped(self) -> None:
        """An inner step was made: a round may be due."""
        self._change.notify()

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        """Returns when something holds that depends on the log; it is looked at after each change."""
        await self._change.until(holds, lambda: None)

    async def final_round(self) -> None:
        """Before a graceful leave: returns when the log holds all inner steps made until now.

        `run` has to be running; the caller sets the limit.
        """
        steps = self._weights.inner_steps
        self._urgent = True
        self._change.notify()
        try:
            await self._change.until(lambda: min(self._ends())[0] >= steps, lambda: None)
        finally:
            self._urgent = False

    async def permission(self) -> None:
        """Returns when an entry lets this replica go to another stage (LEAVE, design section 10).

        `run` has to be running; the caller sets the limit, and stays if it cancels.
        """
        me = self._context.me
        self._member.leaves = True
        try:
            await self._change.until(lambda: me in self._replica.log.leaving, lambda: None)
        finally:
            self._member.leaves = False

    # -- the loop

    async def _act(self) -> None:
        now_s = asyncio.get_running_loop().time()
        peers = self._peers()
        group = self._group(peers)
        self._replica.offered.hear(peers, self._replica.log.head_at, now_s)
        position = self._position(now_s, group)
        action = next_action(position)
        if self._decisions is not None and not isinstance(action, Wait):
            answer = {"action": type(action).__name__, "order": position.order}
            self._decisions.note("lead", answer, stage=self._context.stage, position=position)
        match action:
            case Wait(until_s):
                await self._wait(min(now_s + POLL_S, until_s if until_s is not None else now_s + POLL_S))
            case CatchUp():
                await self._catch_up(group)
            case Lead():
                await self._lead(group, [member.peer for member in peers if member.silent])

    async def _wait(self, limit_s: float) -> None:
        """Until something changes; who stood still meanwhile hears what was said before it leads anything."""
        await self._change.wait(limit_s)
        now_s = asyncio.get_running_loop().time()
        if now_s - limit_s > STOOD_STILL_S:
            self._not_before_s = max(self._not_before_s, now_s + STOOD_STILL_S)

    def _position(self, now_s: float, group: Sequence[GroupMember]) -> Position:
        me = self._context.me
        mine = next(member for member in group if member.peer == me)
        apart = self.spec.outer.inner_steps / len(self._context.fragments)
        due = should_open(apart, mine, group).yes or bool(self._replica.lost)
        urgent = self._urgent and not self.all_listed
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
            self._context.run_id, self._context.stage, self.height + 1, [member.peer for member in group]
        )
        return Position(
            now_s=now_s,
            me=me,
            group=group,
            order=order,
            height=self.height,
            engaged=self._member.engaged_with is not None,
            behind_since_s=self._behind_since_s,
            wanted_since_s=wanted_since_s,
            not_before_s=self._not_before_s,
            urgent=urgent,
            patience_s=_SWITCHER_S if self._replica.lost and undecided_s is None else TAKEOVER_S,
        )

    async def _lead(self, group: Sequence[GroupMember], silent: Sequence[PeerId]) -> None:
        promise, height = self._promises.current, self.height + 1
        promised = promise.ballot if promise.previous == self.head else 0
        leader = Leader(
            self._context,
            self._replica.log,
            group,
            silent,
            max(promised, self._ballot) + 1,
            self._first_stage_head(),
            lambda line: follow(self._context, self._member, line),
            self._guarded.secure,
            self._replica.lost.next(),
            self._mix(height),
        )
        self._context.event("round-open", {"height": height, "roster": len(group)})
        try:
            await leader.lead()
            self._figures.led += 1
            self._failures = 0
        except ShoalError as error:
            self._ballot = leader.highest_ballot
            self._back_off(f"round {height} not committed: {error}")

    async def _catch_up(self, group: Sequence[GroupMember]) -> bool:
        try:
            await self._catching_up.run(group)
            self._failures = 0
            return True
        except ShoalError as error:
            self._back_off(f"not caught up: {error}")
            return False

    def _back_off(self, reason: str) -> None:
        """Wait a random while, longer after each failure in a row."""
        self._failures += 1
        self._figures.failed += 1
        self._figures.last_reason = reason
        self._context.event("outer-retry", {"why": reason})
        low_s, high_s = _BACKOFF_S
        longest_s = min(low_s * 2 ** min(self._failures, 8), high_s)
        self._not_before_s = asyncio.get_running_loop().time() + self._context.rng.uniform(low_s, longest_s)

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
        self._wanted_since_s, self._ballot = None, 0
        self._brought_back_by = entry.leader if entry.lost else None
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

    def _mix(self, height: int) -> bytes:
        """How each part is encoded from here on, where the spec leaves that to measurement."""
        if height <= self._context.spec.compression.warmup_rounds:
            return b""
        return self._member.mixes.get(self._replica.log.next_fragment.index, b"")

    def _save_residuals(self, entry: Entry, listed: bool) -> None:
        context, kept = self._context, self._replica.residuals.take()
        if self._snapshots.directory is not None and listed and kept:
            fragment = context.fragments[entry.fragment]
            step, _ = self._replica.log.end_of(context.me, context.incarnation, entry.fragment)
            self._snapshots.write(
                save_residuals, self._snapshots.directory, fragment, kept, context.incarnation, step
            )

    # -- views

    def _ends(self) -> list[tuple[int, int]]:
        return self._replica.log.ends_of(self._context.me, self._context.incarnation)

    def _group(self, peers: Sequence[GroupMember]) -> list[GroupMember]:
        """The live replicas, this one as it is now rather than as its last beat told."""
        me = self._context.me
        steps, tokens = max(self._ends())
        mine = GroupMember(
            peer=me,
            incarnation=self._context.incarnation,
            height=self.height,
            head=self.head,
            state_root=self.state_root,
            steps_since_round=0 if self.reentering else self._weights.inner_steps - steps,
            tokens_since_round=self._weights.tokens - tokens,
            log_tokens=self.tokens,
            uplink=next((member.uplink for member in peers if member.peer == me), 1.0),
        )
        return [mine, *(member for member in peers if member.peer != me and not member.silent)]
