"""A sweep: case after case, in as few groups of processes as possible. Both soaks of faults are some."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from fault_orders import JsonObject
from fault_replica import Nursery

from shoal.protocol.errors import ShoalError

_WIDTH = 40  # of a case's name


class Told(Protocol):
    """A case."""

    @property
    def tells_lies(self) -> bool:
        """Whether others refuse who was struck from then on."""


C = TypeVar("C", bound=Told)
G = TypeVar("G")
P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Failure(Generic[C]):
    """A promise that was broken, or a point that nobody passed."""

    case: C
    why: str


class Sweep(ABC, Generic[C, G, P]):
    """Plays cases; a group that was broken, or told lies, is followed by a new one."""

    def __init__(self, nursery: Nursery, *, verbose: bool) -> None:
        self.nursery = nursery
        self._verbose = verbose
        self.played: list[P] = []
        self.failed: list[Failure[C]] = []

    @abstractmethod
    async def play(self, group: G, case: C) -> P:
        """Play one case, and print it."""

    async def through(
        self, cases: Sequence[C], group_in: Callable[[Path], AbstractAsyncContextManager[G]]
    ) -> None:
        """All of these. `group_in`: a new group, which has a folder for its files."""
        waiting = list(cases)
        while waiting:
            with tempfile.TemporaryDirectory() as folder:
                async with group_in(Path(folder)) as group:
                    while waiting and await self._is_good_after(group, waiting.pop(0)):
                        pass

    async def _is_good_after(self, group: G, case: C) -> bool:
        """Play it; whether the group is good for another one."""
        try:
            played = await self.play(group, case)
        except (AssertionError, TimeoutError, ConnectionError, RuntimeError, ShoalError) as error:
            why = f"{type(error).__name__}: {error}"
            self.failed.append(Failure(case, why))
            print(f"{case!s:{_WIDTH}} FAILED {why if self._verbose else why[:300]}", flush=True)
            return False
        self.played.append(played)
        return not case.tells_lies

    def ends(self) -> JsonObject:
        """How every summary ends."""
        return {
            "failed": [str(failure.case) for failure in self.failed],
            "load_average": round(os.getloadavg()[1], 1),
        }
