"""The newest whole checkpoint as a Hugging Face folder: what the page has of `shoal checkpoint export`.

    {"do": "checkpoint_export"}  ->  {"running": true}
    {"do": "checkpoint_exported"}  ->  {"running": false, "path": "...", "bytes": 1234, "why_not": ""}

Called by the daemon, one at a time; written beside the training, into the run's own folder.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from shoal.node.control import Action
from shoal.protocol.errors import ShoalError, UsageError
from shoal.training.checkpoint import hf_export
from shoal.training.checkpoint.manifest import CHECKPOINTS_FOLDER, numbered
from shoal.training.checkpoint.read import Checkpoint, open_checkpoint

EXPORTS_FOLDER = "exports"


class Exports:
    """Belongs to one daemon. Use as `async with`."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the run."""
        self._checkpoints, self._folder = folder / CHECKPOINTS_FOLDER, folder / EXPORTS_FOLDER
        self._task: asyncio.Task[None] | None = None
        self._made: dict[str, object] = {"path": "", "bytes": 0, "why_not": ""}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)  # a thread cannot be stopped

    @property
    def actions(self) -> dict[str, Action]:
        return {"checkpoint_export": self._start, "checkpoint_exported": self._status}

    async def _start(self, request: Mapping[str, Any]) -> object:
        if not self._running:
            self._task = asyncio.create_task(self._export(), name="export a checkpoint")
        return {"running": True}

    async def _status(self, request: Mapping[str, Any]) -> object:
        return {"running": self._running, **self._made}

    @property
    def _running(self) -> bool:
        return self._task is not None and not self._task.done()

    async def _export(self) -> None:
        """A task's edge: what goes wrong is told to whoever asks."""
        self._made = {"path": "", "bytes": 0, "why_not": ""}
        try:
            path = await asyncio.to_thread(self._write)
            size = await asyncio.to_thread(lambda: sum(file.stat().st_size for file in path.iterdir()))
        except (ShoalError, OSError) as error:
            self._made["why_not"] = str(error)
        else:
            self._made |= {"path": str(path), "bytes": size}

    def _write(self) -> Path:
        """Where it lies; what was exported before is there already."""
        checkpoint = self._newest()
        target = self._folder / checkpoint.path.name
        return target if target.exists() else hf_export.export(checkpoint, target).path

    def _newest(self) -> Checkpoint:
        for _, path in reversed(numbered(self._checkpoints)):
            with contextlib.suppress(ShoalError):  # a damaged one is no reason to give no other
                if (checkpoint := open_checkpoint(path)).whole:
                    return checkpoint
        raise UsageError("no whole checkpoint lies on this machine yet; press Checkpoint now first")
