"""Switching from a lost chain to the one that won: what stays behind, and where this process's steps go."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.training.outer.entry import SKIP, Entry, parse
from shoal.training.outer.fork import Chain, share
from shoal.training.outer.local import Rebase
from shoal.training.outer.log import Log
from shoal.training.outer.lost import Listed, LostEntry, contributors, last_listed, listed_in
from shoal.training.outer.replica import Replica
from shoal.training.recovery.chain import Rival


def lost_entries(replica: Replica, won_log: Log, rival: Rival, lost: Chain, won: Chain) -> list[LostEntry]:
    """The own entries since the common one that the chain that won does not hold, in order.

    One that is a re-entry itself stands for what it brought back, scaled once more.
    """
    factor = share(lost, won)
    theirs = [parse(data) for data in rival.entries]
    before: list[Entry] = []
    found = []
    for height in range(rival.ancestor_height + 1, replica.log.height + 1):
        data = replica.log.entry(height)
        if data is None:
            continue
        entry = parse(data)
        source = entry.source()
        if not won_log.holds(source):
            scale = factor * (entry.scale if entry.lost else 1.0)
            processes = {process for process, _ in contributors(source)}
            ours = last_listed(before, source.fragment, processes)
            barred = _barred(entry, ours, last_listed(theirs, source.fragment, processes))
            parts = replica.payloads.parts_at(height)
            found.append(LostEntry(entry.lost or data, source, scale, parts, ours, barred))
        before.append(entry)
    return found


def _barred(entry: Entry, ours: Listed, theirs: Listed) -> set[int]:
    """Parts of a lost entry that hold steps which the chain that won holds as well.

    A part holds of each process it lists the steps since the chain last listed it there. Of a lost re-entry
    the parts that it skipped stay out.
    """
    source = entry.source()
    barred = {part for part in range(entry.parts) if entry.digest(part) == SKIP}
    for part in range(source.parts):
        if any(theirs.get((p, part), 0) > ours.get((p, part), 0) for p in listed_in(source, part)):
            barred.add(part)
    return barred


def settlements(replica: Replica, won_log: Log, rival: Rival, waiting: Sequence[LostEntry]) -> list[Rebase]:
    """What the switch means for the own part in rounds of the lost chain, beyond w ← w + (a_win − a_lost).

    Per round and part: listed by the chain that won, or waiting to re-enter: in the agreed state, sooner or
    later; else in the local weights. Rounds before the common entry stay as they are.
    """
    log, offered = replica.log, replica.offered
    heads = {log.head_at(height) for height in range(rival.ancestor_height, log.height)}
    won = [parse(data) for data in rival.entries]
    changes: list[Rebase] = []
    for previous in offered.previous():
        there = [entry for entry in won if entry.source().previous == previous]
        listed = {
            part for entry in there for part in offered.lists(entry.source()) if entry.digest(part) != SKIP
        }
        earlier = replica.lost.after(previous)  # waits since an earlier switch
        promised = earlier.promised if earlier is not None else frozenset()
        if previous in heads or any(not entry.lost for entry in there):
            for lost in waiting:
                if lost.entry.previous == previous:
                    listed |= offered.lists(lost.entry) & set(lost.welcome)
            if earlier is not None and not won_log.holds(earlier.entry):
                listed |= offered.lists(earlier.entry) & promised
            changes += offered.settle(previous, listed)
        elif there:
            changes += offered.amend(previous, promised, listed)
    for entry in won:
        replica.lost.note(entry)
    return changes
