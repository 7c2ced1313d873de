"""The daemon's side of whole checkpoints: gathers one when it is asked to, the owner's from time to time.

Serves what lies on this peer's disks to those who start from it. `shoal checkpoint now` asks through the
control socket and looks at `status` until the number it was given is finished.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from shoal.node.events import Events
from shoal.node.presence import Presence
from shoal.protocol.errors import NetworkError, ShoalError
from shoal.protocol.identity import PeerId
from shoal.training.checkpoint.gather import Gatherer
from shoal.training.checkpoint.manifest import CHECKPOINTS_FOLDER, START_FOLDER
from shoal.training.checkpoint.read import Checkpoint
from shoal.training.checkpoint.share import Shelf


class Gathering:
    """Belongs to one daemon; one at a time."""

    def __init__(self, presence: Presence, folder: Path, store: Path, events: Events) -> None:
        self._presence = presence
        self._folder = folder / CHECKPOINTS_FOLDER
        self._events = events
        self._wanted = asyncio.Event()
        self._asked = self._finished = 0  # numbers of gatherings
        self._bytes = (0, 0)  # done, of all
        self._result: dict[str, object] = {}
        shelf = Shelf([store, self._folder, folder / START_FOLDER], asyncio.to_thread)
        shelf.serve(presence.transport)

    async def run(self, from_time_to_time: bool) -> None:
        """Until cancelled. Failures are told and kept for whoever asked."""
        while True:
            await self._due(from_time_to_time)
            self._asked, self._bytes = self._finished + 1, (0, 0)
            try:
                self._result = _told(await self._gather())
            except ShoalError as error:
                self._result = {"error": str(error), "exit_code": error.exit_code}
            self._finished = self._asked
            self._wanted.clear()

    def ask(self) -> dict[str, object]:
        """Gather one now, or be told of the one under way. Raises NetworkError before the run is known."""
        if self._presence.spec is None:
            raise NetworkError("this peer does not know the run yet\ntry again in a moment")
        self._asked = self._finished + 1
        self._wanted.set()
        return {"number": self._asked}

    def status(self) -> dict[str, object]:
        """What became of it."""
        done, total = self._bytes
        asked, finished = self._asked, self._finished
        return {
            "asked": asked,
            "finished": finished,
            "done_bytes": done,
            "total_bytes": total,
            "result": self._result,
        }

    async def _due(self, from_time_to_time: bool) -> None:
        known = self._presence.spec
        every_s = known.spec.checkpoint.every_s if known is not None and from_time_to_time else 0.0
        try:
            async with asyncio.timeout(every_s or None):
                await self._wanted.wait()
        except TimeoutError:
            return

    async def _gather(self) -> Checkpoint:
        signed = self._presence.spec
        if signed is None:
            raise NetworkError("this peer does not know the run yet")
        gatherer = Gatherer(
            signed.spec,
            transport=self._presence.transport,
            replicas=self._replicas,
            folder=self._folder,
            offload=asyncio.to_thread,
            event=self._events,
            rng=random.Random(self._presence.rng.getrandbits(64)),
        )
        return await gatherer.gather(self._progress)

    def _replicas(self, stage: int) -> Sequence[PeerId]:
        return [member.peer for member in self._presence.members.view().online(stage)]

    def _progress(self, done: int, total: int) -> None:
        self._bytes = (done, total)


def _told(found: Checkpoint) -> dict[str, object]:
    manifest = found.manifest
    return {
        "path": str(found.path),
        "digest": found.digest,
        "heights": [part.height for part in manifest.parts],
        "heads": [part.head for part in manifest.parts],
        "log_tokens": manifest.log_tokens,
        "bytes": manifest.size_bytes,
    }
