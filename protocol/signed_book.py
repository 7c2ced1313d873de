"""The newest of a kind of list that the run's owner signs, cumulative and versioned, kept on disk.

`revocation` and `amendments` are the two kinds. Versions ride on heartbeats; whoever knows a lower one is
given the list, and a newer one replaces an older one whole.
"""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from shoal.protocol.private_files import write_private


class Versioned(Protocol):
    """A list, verified."""

    @property
    def version(self) -> int: ...


Signed = TypeVar("Signed")
Listed = TypeVar("Listed", bound=Versioned)
Write = Callable[[Path, bytes], None]


class SignedBook(ABC, Generic[Signed, Listed]):
    """`path` None keeps it in memory only. `write` may hand the bytes to an executor: writing blocks."""

    def __init__(self, empty: Listed, path: Path | None = None, write: Write = write_private) -> None:
        """`empty`: version 0. Raises StorageError for a damaged file: it must not pass for an empty list."""
        self._path, self._write = path, write
        self.current = empty
        self.signed: Signed | None = None  # what to give to others
        self.changed: list[Callable[[], None]] = []  # called after a newer list was adopted
        stored = self._load(path) if path else None
        if stored:
            self.signed, self.current = stored

    @property
    def version(self) -> int:
        """What heartbeats carry; 0 where the owner never signed one."""
        return self.current.version

    def adopt(self, signed: Signed) -> bool:
        """Take a list over if it is newer; whether it was.

        Raises ProtocolViolation for one that is forged or drops what must stay, StorageError if the disk
        refuses (the list counts nevertheless).
        """
        if not self._take(signed):
            return False
        try:
            if self._path:
                self._write(self._path, self._file(signed))
        finally:
            self._tell()
        return True

    def reload(self) -> bool:
        """Take over what a command wrote to the same file meanwhile; whether it was newer."""
        stored = self._load(self._path) if self._path else None
        if stored is None or not self._take(stored[0]):
            return False
        self._tell()
        return True

    def _take(self, signed: Signed) -> bool:
        listed = self._newer(signed)
        if listed is not None:
            self.signed, self.current = signed, listed
        return listed is not None

    def _tell(self) -> None:
        for notify in list(self.changed):
            notify()

    @contextlib.contextmanager
    def watch(self) -> Iterator[asyncio.Event]:
        """An event that is set whenever a newer list is taken over, as long as the context lasts."""
        changed = asyncio.Event()
        self.changed.append(changed.set)
        try:
            yield changed
        finally:
            self.changed.remove(changed.set)

    @abstractmethod
    def _newer(self, signed: Signed) -> Listed | None:
        """The list, verified; None if it is not newer. Raises ProtocolViolation."""

    @abstractmethod
    def _load(self, path: Path) -> tuple[Signed, Listed] | None:
        """What `_file` wrote, verified again; None if there is none. Raises StorageError."""

    @abstractmethod
    def _file(self, signed: Signed) -> bytes: ...
