"""The sink that TensorBoard reads: event files in a folder. Blocking; `telling` calls it in a thread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.node.sinks.extra import require_extra
from shoal.node.sinks.scalars import Scalar
from shoal.protocol.errors import StorageError


class TensorBoard:
    """Look at it with `tensorboard --logdir FOLDER`. A run that goes on goes on in the same folder."""

    title = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        """Raises UsageError without the package, StorageError for a folder that cannot be."""
        require_extra("tensorboard", "--tensorboard")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.fresh = not any(folder.glob("events.out.tfevents.*"))
        except OSError as error:
            raise StorageError(f"--tensorboard cannot use {folder}: {error.strerror}") from error
        self._folder = folder
        self._writer: Any = None

    def write(self, scalars: Sequence[Scalar]) -> None:
        """On the disk when it returns."""
        from tensorboard.summary import Writer

        if self._writer is None:
            self._writer = Writer(str(self._folder))
        try:
            for name, value, tokens, at in scalars:
                self._writer.add_scalar(name, value, tokens, wall_time=at)
            self._writer.flush()
        except BaseException:
            self._writer = None  # its thread has died: the next write begins another file
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
