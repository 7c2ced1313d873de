"""Named fault points: at every message a transport carries, and at a few steps between them.

`<Message>.sending` is passed before a message is handed to the transport, `.sent` once that has taken it,
`.received` when it has arrived whole and before anybody looks at it. Steps that are no messages have names of
their own (`define`). Nothing happens at a point unless a test wrapped the peer's transport in a
`faulty_transport.FaultyTransport` and armed its `Faults`: Shoal itself never does, and no message, file or
variable makes it.

Actions: `kill` and `freeze` stop the process (SIGKILL, SIGSTOP; a simulated world passes its own). `delay`
holds the message, and so what follows on its stream, for some seconds. `drop` loses it and, since a stream
has no gaps, all that would follow on that stream in that direction, as when a router forgets a connection;
such a stream never ends in order. `corrupt` flips bits of the payload or cuts it short, before checksums
are made or after they are checked: it is what a broken peer sends.
"""

from __future__ import annotations

import asyncio
import enum
import os
import random
import re
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from shoal.protocol import wire
from shoal.protocol.errors import UsageError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Buffer

PLACES = ("sending", "sent", "received")
DELAY_MOST_S = 600.0
_NTH_MOST = 1_000_000
_STEP = re.compile(r"[a-z]+\.[a-z]+")
_steps: set[str] = set()
Blow = Callable[[PeerId], Awaitable[None]]
Tamper = Callable[[PeerId, object, Buffer], tuple[object, Buffer]]


class Action(enum.Enum):
    """What happens at a point."""

    KILL = "kill"
    FREEZE = "freeze"
    DELAY = "delay"
    DROP = "drop"
    CORRUPT = "corrupt"


@dataclass(frozen=True, slots=True)
class Arming:
    """An action at the `nth` time that a point is passed, by `who` and towards `remote` where named.

    Raises UsageError for points that do not exist and actions that mean nothing there.
    """

    point: str
    action: Action
    nth: int = 1
    seconds: float = 0.0  # of a delay
    who: PeerId | None = None
    remote: PeerId | None = None

    def __post_init__(self) -> None:
        message, _, place = self.point.partition(".")
        at_message = wire.is_message(message) and place in PLACES
        if not at_message and self.point not in _steps:
            raise UsageError(
                f"no fault point is called {self.point[:64]!r}; a message has .{', .'.join(PLACES)}, "
                f"steps are {', '.join(sorted(_steps)) or 'none'}"
            )
        if self.action in (Action.DROP, Action.CORRUPT) and not at_message:
            raise UsageError(f"{self.point} passes no message that one could {self.action.value}")
        if self.action is Action.CORRUPT and place == "sent":
            raise UsageError(f"at {self.point} it is too late to corrupt; arm {message}.sending")
        if not 1 <= self.nth <= _NTH_MOST:
            raise UsageError(f"nth={self.nth}: from 1 to {_NTH_MOST}")
        if (self.action is Action.DELAY) != (0.0 < self.seconds <= DELAY_MOST_S):
            raise UsageError(f"{self.action.value} {self.seconds} s: only a delay, up to {DELAY_MOST_S:g}")

    @classmethod
    def parse(cls, text: str) -> Arming:
        """From `point action [seconds=S] [nth=N] [who=PEER] [remote=PEER]`. Raises UsageError."""
        point, action, *rest = text.split() if len(text.split()) > 1 else (text, "")
        if action not in {known.value for known in Action}:
            raise UsageError(f"{text[:128]!r}: {action[:64]!r} is no action")
        values: dict[str, Any] = {}
        readers: dict[str, Callable[[str], Any]] = {
            "seconds": float,
            "nth": int,
            "who": PeerId,
            "remote": PeerId,
        }
        for word in rest:
            key, equals, value = word.partition("=")
            if key not in readers or not equals or not value or key in values:
                raise UsageError(f"{text[:128]!r}: {word!r} is not understood or said twice")
            try:
                values[key] = readers[key](value)
            except ValueError as error:
                raise UsageError(f"{text[:128]!r}: {word!r} is no number") from error
        return cls(point, Action(action), **values)

    def __str__(self) -> str:
        """What `parse` reads."""
        options = {"seconds": self.seconds, "nth": self.nth, "who": self.who, "remote": self.remote}
        plain = {"seconds": 0.0, "nth": 1}
        said = [f"{key}={value}" for key, value in options.items() if value not in (None, plain.get(key))]
        return " ".join((self.point, self.action.value, *said))


def define(step: str) -> str:
    """Name a step that is no message, `thing.doing`, at import. Raises UsageError for other forms."""
    if not _STEP.fullmatch(step):
        raise UsageError(f"{step!r}: a step is called thing.doing, in small letters")
    _steps.add(step)
    return step


def steps() -> list[str]:
    """All steps that imported modules have defined."""
    return sorted(_steps)


async def kill_this_process(_: PeerId) -> None:
    """SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


async def freeze_this_process(_: PeerId) -> None:
    """SIGSTOP; returns after SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


class Faults:
    """What is armed in one process, or in one simulated world, whose `kill` and `freeze` then hang."""

    def __init__(
        self,
        *,
        kill: Blow = kill_this_process,
        freeze: Blow = freeze_this_process,
        permit: Callable[[Arming], bool] = lambda arming: True,
        tell: Callable[[Arming, PeerId], None] = lambda arming, peer: None,
        seed: int = 0,
    ) -> None:
        """`permit` is asked at the moment of striking, so that processes can agree on who is struck; `tell`
        is called just before anything happens: a killed process says nothing afterwards."""
        self.struck: list[tuple[Arming, PeerId]] = []  # what has happened, and at whom
        self.tamper: Tamper | None = None  # changes all that is sent; in-process only
        self.rng = random.Random(seed)  # of corruption
        self._kill = kill
        self._freeze = freeze
        self._permit = permit
        self._tell = tell
        self._armed: list[tuple[Arming, list[int]]] = []  # with how often the point has been passed

    @property
    def armed(self) -> bool:
        """Whether anything is."""
        return bool(self._armed)

    def arm(self, arming: Arming) -> None:
        """Strike once; armings are independent of each other."""
        self._armed.append((arming, [0]))

    def disarm(self) -> None:
        """Nothing strikes any more."""
        self._armed.clear()

    async def passing(self, point: str, me: PeerId, remote: PeerId | None = None) -> Action | None:
        """Pass a point. Returns what the message itself is to suffer: DROP or CORRUPT; else None."""
        arming = self._due(point, me, remote)
        if arming is None or not self._permit(arming):
            return None
        self.struck.append((arming, me))
        self._tell(arming, me)
        match arming.action:
            case Action.KILL:
                await self._kill(me)
            case Action.FREEZE:
                await self._freeze(me)
            case Action.DELAY:
                await asyncio.sleep(arming.seconds)
            case suffered:
                return suffered
        return None

    def _due(self, point: str, me: PeerId, remote: PeerId | None) -> Arming | None:
        due: int | None = None  # of several the one armed first; the others strike at the next passing
        for index, (arming, passed) in enumerate(self._armed):
            if arming.point == point and arming.who in (None, me) and arming.remote in (None, remote):
                passed[0] += 1
                if due is None and passed[0] >= arming.nth:
                    due = index
        return self._armed.pop(due)[0] if due is not None else None
