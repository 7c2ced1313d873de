"""The audit log: who ordered what, when, and what came of it. Append-only and private, in the owner's folder.

Bounded: when the file is full it becomes the older half, and the older half before it goes. Blocking.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shoal.protocol import limits
from shoal.protocol.private_files import append_private, read_private

_FILE, _OLDER = "orders.jsonl", "orders.older.jsonl"
AUDIT_BYTES = 512 * limits.KIB  # of each half; about two thousand orders


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One line."""

    number: int  # from 1, without gaps
    at_unix_s: float
    who: str
    what: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    changed: bool = False  # whether it had an effect that was not there before
    refused: bool = False
    version: int = 0  # of the amendments afterwards
    text: str = ""  # the result in words
    key: str = ""  # under which it is not performed twice

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


class AuditLog:
    """The log in an owner's folder. Callers hold the folder's lock."""

    def __init__(self, folder: Path, most_bytes: int = AUDIT_BYTES) -> None:
        self._path, self._older = folder / _FILE, folder / _OLDER
        self._most_bytes = most_bytes

    def append(self, entry: AuditEntry) -> AuditEntry:
        """On disk when this returns; returned with its number. Raises StorageError."""
        known = self.entries()
        entry = dataclasses.replace(entry, number=known[-1].number + 1 if known else 1)
        line = json.dumps(entry.to_json(), separators=(",", ":"))
        if self._path.exists() and self._path.stat().st_size + len(line) + 2 > self._most_bytes:
            os.replace(self._path, self._older)
        append_private(self._path, line)
        return entry

    def entries(self) -> list[AuditEntry]:
        """All that is kept, oldest first. A line that a crash tore is left out. Raises StorageError."""
        found = []
        for path in (self._older, self._path):
            for line in (read_private(path, 2 * self._most_bytes) or b"").splitlines():
                try:
                    found.append(AuditEntry(**json.loads(line)))
                except (ValueError, TypeError):
                    continue
        return found

    def with_key(self, key: str) -> AuditEntry | None:
        """What was performed under a key."""
        return next((e for e in reversed(self.entries()) if key and e.key == key and not e.refused), None)
