"""What a peer's policies decided, with all that they saw: a file from which each decision can be made again.

Written where asked for (`shoal join --decisions FILE`), one JSON object a line: the routing choice of each
micro-batch, each plan to move a replica, and each time that this replica opened a round or caught up. The
policies are pure, so that `node/simulate/replay` comes to the same answers anywhere, or tells which differ.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Self


class DecisionLog:
    """One process's file, appended to. Not for threads: every policy is asked on the loop."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a kill loses no line

    def note(self, policy: str, answer: object, **seen: object) -> None:
        """`seen`: the policy's arguments by name; `answer`: what it said."""
        line = {"policy": policy, "answer": plain(answer), **{name: plain(of) for name, of in seen.items()}}
        self._file.write(json.dumps(line) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def plain(value: object) -> object:
    """As JSON has it: dataclasses become objects, bytes hex."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
