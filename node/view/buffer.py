"""The bounded buffer between what happens in a peer and whoever is told: training never waits for it.

`Buffer.add` is an `Events`: the daemon tees everything through it. Each reader has the number that it has
seen; what is older than the buffer is dropped, and counted. Secrets never get in: kinds that carry some are
left out, so are texts with a join token in them, and places on a volunteer's disk.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from shoal.node.events import Events, Fields
from shoal.node.view.messages import (
    EVENTS_IN_BATCH,
    FIELD_CHARACTERS,
    FIELDS,
    KIND_CHARACTERS,
    VALUE_CHARACTERS,
    TelemetryEvent,
    TelemetryField,
)
from shoal.protocol.join_token import TOKEN_PREFIX

EVENTS = 1024  # kept for owners that are away: at ten a minute more than an hour and a half
BATCH_CHARACTERS = 12_000  # of one message: a header holds 64 KiB, a character takes up to four bytes
SECRET_KINDS = frozenset({"invitation", "dashboard-link"})
QUIET_KINDS = frozenset({"round-open"})  # the round itself is told
SECRET_FIELDS = frozenset({"token", "link", "url"})
PRIVATE_FIELDS = frozenset({"path", "data_dir", "pid"})
KIND_BURST, KIND_PER_S, KINDS = 120.0, 2.0, 256  # of one kind: a quarrel must not push the rest out
_LARGEST = 1e300


class Buffer:
    """Of one process. Safe from any thread."""

    def __init__(
        self,
        *,
        owner: bool = False,
        clock: Callable[[], float] = time.time,
        capacity: int = EVENTS,
        places: Sequence[Path] = (),
    ) -> None:
        """`owner`: of the owner's own peer, whose disk is no secret to other owners, and who tells of others'
        coming and going; that all peers see. `clock`: Unix seconds. `places`: where its files are; errors
        of the disk name them."""
        self.dropped = 0  # fell out before everybody had them, or were too many of one kind
        self._clock = clock
        self._owner = owner
        named = [] if owner else [str(place) for place in places if len(place.parts) > 1]
        self._places = sorted(named, key=len, reverse=True)
        self._held: deque[TelemetryEvent] = deque(maxlen=capacity)
        self._count = 0
        self._budgets: dict[str, tuple[float, float]] = {}  # kind -> (left, as of)
        self._lock = threading.Lock()

    def add(self, kind: str, fields: Fields) -> None:
        """Keep an event, if it may be told and its kind is not too frequent."""
        if kind in SECRET_KINDS or kind in QUIET_KINDS or (kind.startswith("peer_") and not self._owner):
            return
        now = self._clock()
        hidden = SECRET_FIELDS if self._owner else SECRET_FIELDS | PRIVATE_FIELDS
        told = tuple(_fields(fields, hidden, self._places))
        with self._lock:
            if not self._affords(kind, now):
                self.dropped += 1
                return
            self._count += 1
            self.dropped += len(self._held) == self._held.maxlen
            at = min(max(now, 0.0), 1e11)
            self._held.append(TelemetryEvent(self._count, at, kind[:KIND_CHARACTERS] or "event", told))

    def tee(self, events: Events) -> Events:
        """Tells `events` and this buffer."""

        def both(kind: str, fields: Fields) -> None:
            events(kind, fields)
            self.add(kind, fields)

        return both

    def after(self, number: int) -> tuple[TelemetryEvent, ...]:
        """The next events that one message holds."""
        with self._lock:
            first = self._held[0].number if self._held else 0
            start = max(0, number + 1 - first)
            found: list[TelemetryEvent] = []
            characters = 0
            for index in range(start, min(start + EVENTS_IN_BATCH, len(self._held))):
                event = self._held[index]
                characters += _characters(event)
                if found and characters > BATCH_CHARACTERS:
                    break
                found.append(event)
            return tuple(found)

    @property
    def count(self) -> int:
        """Events so far, those that fell out included."""
        return self._count

    def __len__(self) -> int:
        return len(self._held)

    def _affords(self, kind: str, now: float) -> bool:
        left, as_of = self._budgets.get(kind, (KIND_BURST, now))
        left = min(KIND_BURST, left + max(0.0, now - as_of) * KIND_PER_S)
        if len(self._budgets) < KINDS or kind in self._budgets:
            self._budgets[kind] = (max(0.0, left - 1.0), now)
        return left >= 1.0


def _fields(fields: Fields, hidden: frozenset[str], places: Sequence[str]) -> Iterator[TelemetryField]:
    left = FIELDS
    for name, value in _flat("", fields):
        if left == 0:
            return
        if name.rpartition(".")[2] in hidden or not name:
            continue
        left -= 1
        name = name[:FIELD_CHARACTERS].encode(errors="replace").decode()
        if isinstance(value, int | float) and -_LARGEST < value < _LARGEST:
            yield TelemetryField(name, number=float(value), numeric=True)
        else:
            text = str(value)
            for place in places:
                text = text.replace(place, "its folder")
            text = "(secret)" if TOKEN_PREFIX in text else text[:VALUE_CHARACTERS]
            yield TelemetryField(name, text if text.isascii() else text.encode(errors="replace").decode())


def _flat(prefix: str, fields: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Nested mappings as "outer.inner"; lists of a few plain values as text; None is left out."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        elif isinstance(value, list | tuple):
            yield prefix + name, ", ".join(map(str, value[:16]))
        elif value is not None:
            yield prefix + name, value


def _characters(event: TelemetryEvent) -> int:
    return 32 + len(event.kind) + sum(16 + len(field.name) + len(field.text) for field in event.fields)
