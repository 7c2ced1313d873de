"""Small private files that are written behind the event loop's back, in order. Used for the owner's lists.

What is in them counts in this process at once, whether or not the disk takes it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from shoal.protocol.private_files import write_private

log = logging.getLogger(__name__)


class WriteBehind:
    """Called like `write_private`, but returns at once and raises nothing; `close` waits for the disk."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lists")

    def __call__(self, path: Path, data: bytes) -> None:
        self._thread.submit(write_private, path, data).add_done_callback(functools.partial(_look_at, path))

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)


def _look_at(path: Path, written: Future[None]) -> None:
    if (error := written.exception()) is not None:
        log.error("%s was not stored: %s", path.name, error)
