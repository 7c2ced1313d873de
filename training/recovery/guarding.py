"""Guarding: the stages that one peer keeps a copy of, besides the one that it trains.

It looks now and then at who should guard what (`guardians`), begins what falls to this peer and ends what
others have by now. A copy that fails is begun again, and takes nothing else along. Belongs to a trainer: who
goes to another stage finds its copies on its disk again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.dht.beats import Beat, StageBeat
from shoal.dht.members import Members
from shoal.dht.view import SwarmView
from shoal.protocol.errors import StorageError
from shoal.protocol.identity import Role
from shoal.training.neighbours import stage_guardians, stage_members
from shoal.training.outer.context import Context
from shoal.training.plan import make_plan
from shoal.training.recovery.guard import Guard
from shoal.training.recovery.guardians import (
    GUARDED_MOST,
    Candidate,
    choose_guardians,
    guard_bytes,
    may_let_go,
)
from shoal.training.recovery.snapshots import clear, has_snapshot, stage_directory

LOOK_S = 2.0
AGAIN_MOST_S = 120.0  # before a copy that failed is begun again; one that held for so long has failed anew


@dataclass(frozen=True, slots=True)
class _Guarded:
    guard: Guard
    task: asyncio.Task[None]


class Guarding:
    """See the module. `run` until cancelled."""

    def __init__(
        self,
        context: Context,
        members: Members,
        spare_bytes: int,
        directory: Path | None,
        first: Callable[[], bool],
    ) -> None:
        """`context`: this peer's place at its own stage; with `spare_bytes` of 0 it guards nothing.

        `first`: whether this is the one of the peer's replicas that does the guarding."""
        self._spare_bytes = spare_bytes
        self._first = first
        self._context = context
        self._members = members
        self._directory = directory
        plan = make_plan(context.spec)
        self._sizes = [stage.parameters for stage in plan.stages]
        self._needs = [guard_bytes(stage, context.spec.outer.snapshot_every) for stage in plan.stages]
        self._guarded: dict[int, _Guarded] = {}
        self._failures: Counter[int] = Counter()  # by stage

    @property
    def spare_bytes(self) -> int:
        """Memory for copies."""
        return self._spare_bytes if self._first() else 0

    def beats(self) -> tuple[StageBeat, ...]:
        """What heartbeats say of the copies."""
        found = (guarded.guard.beat() for _, guarded in sorted(self._guarded.items()))
        return tuple(beat for beat in found if beat is not None)

    def holds(self, stage: int) -> int:
        """The height of the copy of a stage, 0 without one."""
        guarded = self._guarded.get(stage)
        return guarded.guard.height if guarded is not None else 0

    def status(self) -> list[dict[str, object]]:
        """Each copy, how far it is, and how far behind its replicas."""
        return [
            {
                "stage": beat.stage,
                "height": beat.height,
                "behind": max(
                    (m.height for m in stage_members(self._members, beat.stage)), default=beat.height
                )
                - beat.height,
                "bytes": self._needs[beat.stage],
            }
            for beat in self.beats()
        ]

    def occupied(self) -> set[int]:
        """Stages that are held or guarded here."""
        return {*self._held(), *self._guarded}

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        if self._spare_bytes <= 0:
            return
        async with asyncio.TaskGroup() as tasks:
            begun = False
            while True:
                if self._first():
                    if not begun:
                        for stage in await self._context.offload(self._on_disk, self._held()):
                            self._begin(stage, tasks)
                    begun = True
                    await self._look(tasks)
                await asyncio.sleep(LOOK_S * self._context.rng.uniform(0.9, 1.1))

    async def stop_at(self, stage: int) -> None:
        """This peer is about to hold the stage itself; what it kept of it stays on its disk."""
        if (guarded := self._guarded.pop(stage, None)) is not None:
            guarded.task.cancel()
            await asyncio.wait({guarded.task})

    async def _look(self, tasks: asyncio.TaskGroup) -> None:
        me, view = self._context.me, self._members.view()
        chosen = choose_guardians(self._context.run_id, self._needs, self._candidates(view), view.part())
        for stage, guardians in enumerate(chosen):
            guarded = self._guarded.get(stage)
            failed = guarded is not None and guarded.task.done()
            if failed:
                del self._guarded[stage]
            if failed or (guarded is None and me in guardians):
                self._begin(stage, tasks)
            elif guarded is not None:
                heights = {other.peer: other.height for other in stage_guardians(self._members, stage)}
                heights[me] = guarded.guard.height
                if may_let_go(me, guardians, heights, bool(view.online(stage))):
                    await self._end(stage, guarded)

    def _begin(self, stage: int, tasks: asyncio.TaskGroup) -> None:
        if stage in self._held():
            return
        taken = sum(self._needs[guarded] for guarded in self._guarded)
        if len(self._guarded) >= GUARDED_MOST or taken + self._needs[stage] > self.spare_bytes:
            return
        context = self._context.beside(stage, self._sizes[stage], payload_budget_bytes=0)
        guard = Guard(context, lambda: stage_members(self._members, stage), self._directory)
        self._guarded[stage] = _Guarded(
            guard, tasks.create_task(self._guard(stage, guard), name=f"guard stage {stage}")
        )

    async def _guard(self, stage: int, guard: Guard) -> None:
        """Until cancelled, or the guard fails."""
        try:
            await guard.run()
        except Exception as error:  # the edge of this task: a copy is no reason to train no more
            text = f"the copy of stage {stage} failed, and is begun again: {type(error).__name__}: {error}"
            self._context.event("guard-failed", {"stage": stage, "why": str(error), "text": text})
            now_s = asyncio.get_running_loop().time()
            if guard.level_since_s is not None and now_s - guard.level_since_s >= AGAIN_MOST_S:
                del self._failures[stage]
            times = self._failures[stage] = min(self._failures[stage] + 1, 16)
            longest_s = min(LOOK_S * 2.0**times, AGAIN_MOST_S)
            await asyncio.sleep(self._context.rng.uniform(0.5, 1.0) * longest_s)  # counts as held till then

    async def _end(self, stage: int, guarded: _Guarded) -> None:
        """Two others have it: forget it, on disk too."""
        del self._guarded[stage]
        guarded.task.cancel()
        await asyncio.wait({guarded.task})
        self._context.event("guarding-ended", {"stage": stage})
        if self._directory is not None:
            folder = stage_directory(self._context.beside(stage, self._sizes[stage]), self._directory)
            try:
                await self._context.offload(clear, folder)
            except StorageError as error:
                text = f"the copy of stage {stage}, which others keep now, stays on the disk: {error}"
                self._context.event("disk-refused", {"why": str(error), "text": text})

    def _on_disk(self, held: Sequence[int]) -> list[int]:
        """Stages whose copy an earlier process of this peer left."""
        directory, context = self._directory, self._context
        if directory is None:
            return []
        others = [stage for stage in range(len(self._sizes)) if stage not in held]
        folders = {s: stage_directory(context.beside(s, self._sizes[s]), directory) for s in others}
        return [stage for stage in others if has_snapshot(folders[stage])][:GUARDED_MOST]

    def _held(self) -> tuple[int, ...]:
        """Stages of this peer's own replicas."""
        mine = self._members.view().get(self._context.me)
        return (self._context.stage, *(mine.stages if mine is not None else ()))

    def _candidates(self, view: SwarmView) -> list[Candidate]:
        """Trainers that are online; of whom nothing is heard is taken for able."""
        able = sum(self._needs)
        mine = view.get(self._context.me)
        token = mine.token_id if mine is not None else ""
        found = [Candidate(self._context.me, self._held(), self.spare_bytes, tuple(self._guarded), token)]
        for member in view.here():
            trains = member.state == "online" and member.stages and Role.TRAINER in member.roles
            if trains and member.peer != view.me:
                beat = member.beat or Beat(spare_bytes=able)
                guards = tuple(kept.stage for kept in beat.guards if kept.stage < len(self._needs))
                found.append(Candidate(member.peer, member.stages, beat.spare_bytes, guards, member.token_id))
        return found
