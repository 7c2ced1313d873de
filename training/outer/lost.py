"""Lost: entries of a chain that lost a fork, which this peer holds until they have re-entered.

Whoever switches keeps them with their payloads, and leads a re-entry of each, in their order, as soon as it
can. Until then it contributes nothing, so that the log's step intervals stay in order. What others have
brought back is dropped here: the log says so by itself, since it holds the steps. Parts that hold steps which
the chain that won holds too do not re-enter; whoever they list takes its own steps back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shoal.training.outer.entry import SKIP, Contributor, Entry, seats_in
from shoal.training.outer.log import Log
from shoal.training.outer.reduce import Published

# Then what a majority could not fetch is written off: what nobody can deliver must not block a group.
ATTEMPTS = 4
Process = tuple[str, int]  # peer, incarnation
Listed = dict[tuple[Process, int], int]  # process and part of a fragment -> last step


@dataclass(slots=True, eq=False)
class LostEntry:
    """One entry that was decided on another chain, and no re-entry itself."""

    data: bytes
    entry: Entry
    scale: float
    parts: Mapping[int, Published]  # those held here
    listed_before: Listed  # on its chain since the fork: a part holds the steps since
    barred: set[int] = field(default_factory=set)  # parts of which the chain that won has some steps
    attempts: int = 0  # to bring it back that were in vain
    since_s: float = 0.0  # loop time of the switch
    promised: frozenset[int] = frozenset()  # parts that were to re-enter when this peer switched
    returned: bool = False  # it has re-entered itself
    # Whose steps in which part another entry has brought.
    delivered: set[tuple[Process, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.promised = frozenset(self.welcome)

    def delivered_to(self, process: Process) -> set[int]:
        """Parts in which the agreed state has a process's steps by another entry."""
        return {part for who, part in self.delivered if who == process}

    @property
    def last_attempt(self) -> bool:
        return self.attempts + 1 >= ATTEMPTS

    @property
    def welcome(self) -> list[int]:
        """Parts that may re-enter."""
        return [p for p in range(self.entry.parts) if self.entry.digest(p) != SKIP and p not in self.barred]


class Lost:
    """In the order of their chain."""

    def __init__(self) -> None:
        self._entries: list[LostEntry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entries: Sequence[LostEntry], now_s: float) -> None:
        """After a switch: before those of an earlier one, whose steps come later."""
        self._entries[:0] = entries
        for lost in self._entries:
            lost.since_s = now_s  # the others switch about now, too

    def rescale(self, factor: float) -> None:
        """The chain where these were to re-enter has been lost itself."""
        for lost in self._entries:
            lost.scale *= factor

    def next(self) -> LostEntry | None:
        """What to bring back now."""
        return self._entries[0] if self._entries else None

    def find(self, digest: bytes) -> Published | None:
        """A part of some entry here."""
        found = (part for lost in self._entries for part in lost.parts.values())
        return next((part for part in found if part.digest == digest), None)

    def note(self, entry: Entry) -> None:
        """An entry has been applied: parts that list steps which it lists too cannot re-enter any more.

        A re-entry counts as well: three sides of a cut may each have ended one round, with the same steps.
        """
        if not self._entries:
            return
        source = entry.source()
        rows = {process: row for process, row in contributors(source)}
        for lost in self._entries:
            if lost.entry.fragment != entry.fragment:
                continue
            lost.returned |= bool(entry.lost) and source == lost.entry
            ends = {process: row.to_step for process, row in contributors(lost.entry)}
            both = ends.keys() & rows.keys()
            parts = [part for part in range(entry.parts) if entry.digest(part) != SKIP] if both else ()
            for part in parts:
                same = both & listed_in(source, part) & listed_in(lost.entry, part)
                same = {p for p in same if rows[p].to_step > lost.listed_before.get((p, part), 0)}
                lost.delivered |= {(p, part) for p in same if rows[p].to_step >= ends[p]}  # else but some
                if same:
                    lost.barred.add(part)

    def delivered_to(self, previous: bytes, process: Process) -> set[int]:
        """The same of all that followed a head."""
        found = (lost for lost in self._entries if lost.entry.previous == previous)
        return {part for lost in found for part in lost.delivered_to(process)}

    def after(self, previous: bytes) -> LostEntry | None:
        """The lost entry that followed a head."""
        return next((lost for lost in self._entries if lost.entry.previous == previous), None)

    def sift(self, log: Log) -> list[LostEntry]:
        """Drop what may re-enter no more: the log holds its steps by now, or some of each part.

        Returns what did not re-enter itself: of its steps the log has what was `delivered`, for it may hold
        those of a process by another lost entry, which left a part out.
        """
        over = [lost for lost in self._entries if not lost.welcome or log.holds(lost.entry)]
        self._entries = [lost for lost in self._entries if lost not in over]
        return [lost for lost in over if not lost.returned]


def contributors(entry: Entry) -> list[tuple[Process, Contributor]]:
    """Who contributed to a round, by process."""
    seats = entry.roster
    return [((seats[row.seat].peer, seats[row.seat].incarnation), row) for row in entry.contributors]


def listed_in(entry: Entry, part: int) -> set[Process]:
    """The processes that a round's part lists."""
    seats = (entry.roster[seat] for seat in seats_in(entry.listed_in(part)))
    return {(seat.peer, seat.incarnation) for seat in seats}


def last_listed(entries: Sequence[Entry], fragment: int, processes: set[Process]) -> Listed:
    """Up to which step some entries list these processes in each part of a fragment, re-entries included."""
    found: Listed = {}
    for entry in entries:
        source = entry.source()
        rows = {process: row for process, row in contributors(source) if process in processes}
        if source.fragment != fragment or not rows:
            continue
        for part in range(entry.parts):
            for process in listed_in(source, part) & rows.keys() if entry.digest(part) != SKIP else ():
                found[process, part] = max(rows[process].to_step, found.get((process, part), 0))
    return found
