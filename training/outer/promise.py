"""Promise: the ballot a member is bound to, on disk before it is given: a restart does not forget it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from shoal.protocol import wire
from shoal.protocol.errors import ProtocolViolation, StorageError
from shoal.protocol.private_files import private_directory, read_private, write_private
from shoal.protocol.unbroken import unbroken
from shoal.protocol.wire import Count, Length, wire_message
from shoal.training.outer.context import Context

TellOfDisk = Callable[..., None]
_FILE_BYTES = 4096
# Between two attempts at one height, at most: more than a replica fails in a year. Ballots are bounded, and
# whoever named the last one would end the attempts of all.
LEAP = 1 << 24


def no_disk(write: Callable[..., object], why: str = "") -> None:
    """Nobody tells of it."""


@wire_message
@dataclass(frozen=True, slots=True)
class Promise:
    """The highest ballot accepted for the entry after some head."""

    previous: Annotated[bytes, Length(0, 32)] = b""
    ballot: Count = 0
    leader: Annotated[str, Length(0, 64)] = ""

    def leaps(self, asked: Promise) -> bool:
        """Whether `asked` goes further beyond this than honest attempts do."""
        return asked.ballot > LEAP + (self.ballot if self.previous == asked.previous else 0)

    def binds(self, asked: Promise) -> bool:
        """Whether `asked` comes too late. Ballots rise by number, then by leader; each head has its own."""
        earlier = (asked.ballot, asked.leader) < (self.ballot, self.leader)
        return self.previous == asked.previous and earlier


class Promises:
    """One replica's. Without a directory they last as long as the process."""

    def __init__(self, context: Context, directory: Path | None, tell: TellOfDisk = no_disk) -> None:
        """`tell` hears of each write, and why it was refused."""
        self.current = Promise()
        self._context = context
        self._tell = tell
        self._path = directory / "promise" if directory is not None else None

    async def restore(self) -> None:
        """What an earlier process of this peer promised. A damaged file binds to nothing, and is reported."""
        if self._path is None:
            return
        try:
            await self._context.offload(private_directory, self._path.parent)
            data = await self._context.offload(read_private, self._path, _FILE_BYTES)
            if data is not None:
                self.current = wire.decode(Promise, data, _FILE_BYTES)
        except (StorageError, ProtocolViolation) as error:
            self._tell(write_private, f"{self._path}: {error}")

    async def give(self, promise: Promise) -> None:
        """Bind this peer. Returns when the disk has it; one that refuses is reported, and rounds go on.

        One at a time: a caller that is cancelled stays until its write is over, or it would undo a later one.
        """
        if self._path is not None and promise != self.current:
            try:
                await unbroken(self._context.offload(write_private, self._path, wire.encode(promise)))
                self._tell(write_private)
            except StorageError as error:
                self._tell(write_private, str(error))
        self.current = promise
