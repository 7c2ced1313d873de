"""Left stages: what the disk still has of stages that this peer holds no more, and when it goes.

A peer that comes back within a while finds its state there and fetches the tail only; after that, or beside
two that it left later, the files go, if others have the stage. What nobody else has stays for good: it may be
the last copy. A trainer runs one beside its `Guarding`, whose copies lie in the same folders.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.dht.members import Members
from shoal.protocol.errors import StorageError
from shoal.training.neighbours import stage_guardians, stage_members
from shoal.training.outer.context import Context
from shoal.training.recovery.snapshots import forget

KEEP_S = 3600.0
KEPT = 2  # that were left last
COPIES = 2  # of others, at least, one of them a replica's
LOOK_S = 60.0
_FOLDER = re.compile(r"stage-(\d{1,5})")
_FILE = re.compile(r"(?:snapshot|entry)-(\d{12})\.safetensors")


@dataclass(frozen=True, slots=True)
class Left:
    """What the disk has of a stage."""

    stage: int
    height: int
    since_s: float  # when it was first seen so


def superfluous(left: Sequence[Left], has_copies: Callable[[Left], bool], now_s: float) -> list[Left]:
    """What may go."""
    newest = sorted(left, key=lambda one: (one.since_s, one.stage))[-KEPT:]
    return [one for one in left if (one not in newest or now_s - one.since_s >= KEEP_S) and has_copies(one)]


class LeftStages:
    """See the module. `run` until cancelled."""

    def __init__(
        self,
        context: Context,
        members: Members,
        directory: Path | None,
        first: Callable[[], bool],
        occupied: Callable[[], Collection[int]],
    ) -> None:
        """`first`: whether this is the one of the peer's replicas that looks; `occupied`: stages in whose
        folders somebody of this process works."""
        self._context = context
        self._members = members
        self._directory = directory / context.run_id.hex() if directory is not None else None
        self._first = first
        self._occupied = occupied
        self._left: dict[int, Left] = {}

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        context, directory = self._context, self._directory
        while directory is not None:
            await asyncio.sleep(LOOK_S * context.rng.uniform(0.9, 1.1))
            if self._first():
                await self._look(directory)

    async def _look(self, directory: Path) -> None:
        context, now_s = self._context, asyncio.get_running_loop().time()
        heights: dict[int, int] = await context.offload(on_disk, directory)
        occupied = self._occupied()
        found = {stage: height for stage, height in heights.items() if stage not in occupied}
        self._left = {
            stage: known if known is not None and known.height == height else Left(stage, height, now_s)
            for stage, height in found.items()
            for known in [self._left.get(stage)]
        }
        for one in superfluous([*self._left.values()], self._has_copies, now_s):
            if one.stage in self._occupied():
                continue
            try:
                await context.offload(forget, directory / f"stage-{one.stage}")
                context.event("left-stage-removed", {"stage": one.stage, "height": one.height})
            except StorageError as error:  # again when it has lain there for as long once more
                self._left[one.stage] = Left(one.stage, one.height, now_s)
                text = f"what the disk has of stage {one.stage}, which was left, stays there: {error}"
                context.event("disk-refused", {"why": str(error), "text": text})

    def _has_copies(self, left: Left) -> bool:
        """Whether others have what the disk has, and one of them trains it."""
        replicas = [m for m in stage_members(self._members, left.stage) if m.height >= left.height]
        guardians = [m for m in stage_guardians(self._members, left.stage) if m.height >= left.height]
        return bool(replicas) and len({m.peer for m in (*replicas, *guardians)}) >= COPIES


def on_disk(directory: Path) -> dict[int, int]:
    """Stages of which a run's folder has anything large, each with the height that it comes to."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError):  # a disk that cannot be read has nothing to be removed
        for folder in directory.glob("stage-*"):
            named = _FOLDER.fullmatch(folder.name)
            files = [path for path in folder.rglob("*") if path.is_file() and path.name != "promise"]
            if named is not None and files:
                heights = (_FILE.fullmatch(path.name) for path in files)
                found[int(named[1])] = max((int(height[1]) for height in heights if height), default=0)
    return found
