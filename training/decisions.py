"""What a peer's policies decided, with all that they saw: a file from which each decision can be made again.

Written where asked for (`shoal join --decisions FILE`), one JSON object a line: the routing choice of each
micro-batch, each plan to move a replica, and each time that this replica opened a round or caught up. The
policies are pure, so that `node/simulate/replay` comes to the same answers anywhere, or tells which differ.
A disk that takes no more ends the file, not the training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Self

from shoal.protocol.errors import UsageError


class DecisionLog:
    """One process's file, appended to. Not for threads: every policy is asked on the loop."""

    def __init__(self, path: Path, event: Callable[[str, dict[str, object]], None]) -> None:
        """Raises UsageError."""
        self._path = path
        self._event = event
        self._refused = False
        try:
            self._file = path.open("a", encoding="utf-8", buffering=1)  # a kill loses no line
        except OSError as error:
            why = error.strerror or error
            raise UsageError(f"--decisions {path}: {why}; name a file that can be written") from error

    def note(self, policy: str, answer: object, **seen: object) -> None:
        """`seen`: the policy's arguments by name; `answer`: what it said. Nothing once a write has failed."""
        if self._refused:
            return
        line = {"policy": policy, "answer": plain(answer), **{name: plain(of) for name, of in seen.items()}}
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._refused = True
            text = (
                f"no more decisions are written to {self._path}: {error.strerror or error}; training goes on"
            )
            self._event("decisions-refused", {"path": str(self._path), "why": str(error), "text": text})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # of what a full disk did not take; told already
            self._file.close()


def plain(value: object) -> object:
    """As JSON has it: dataclasses and named tuples become objects, bytes hex."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
