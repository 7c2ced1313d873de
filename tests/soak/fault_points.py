"""Every fault point times every action, on real processes: `python tests/soak/fault_points.py --json`.

A group of workers (mutual TLS on loopback, real membership, fp32 on the wire) plays one case after another:
a clean round, the fault, the others' commit and equal bytes, everybody's return, two more rounds, then P1 and
P4. A line a case: seconds from the blow to the others' COMMIT, their bytes by those of the clean round, how
the one that was struck came back. Then kills and freezes of one of three in mid-transfer, and faults that
come two at once. Goals: 3 s after a kill, 6 s after a freeze, 1.05 times the bytes, replay after a freeze.
Exit status 1: a promise was broken (FAILED) or a goal missed (LATE, HEAVY, SNAPSHOT).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fault_cases import FORGETFUL, play
from fault_doubles import DOUBLES, Double, play_double
from fault_group import FaultGroup, fault_spec
from fault_orders import JsonObject
from fault_outcome import Outcome, figures, table
from fault_replica import Nursery
from fault_sweep import Sweep
from fault_table import Case, all_cases, mid_transfer

from shoal.protocol.faults import Action


@dataclass(frozen=True, slots=True)
class Room:
    """Faults that one kind of group can play, one after another."""

    faults: Sequence[Case | Double]
    peers: int
    mib: int  # fp32 bytes of the stage
    durable: bool = True
    outer: JsonObject | None = None

    def group(self, folder: Path, nursery: Nursery) -> FaultGroup:
        size = self.mib << 18
        spec = fault_spec(outer={"part_bytes": max(1 << 16, size // 4), **(self.outer or {})})
        return FaultGroup(folder, nursery, self.peers, spec, size=size, durable=self.durable)


def rooms(options: argparse.Namespace) -> list[Room]:
    """Who needs a snapshot may find neither one on its disk nor entries elsewhere.

    Nobody here is a guardian: those messages are struck in virtual time alone.
    """

    def wanted(faults: Sequence[Case | Double]) -> list[Case | Double]:
        return [fault for fault in faults if options.only in str(fault)]

    joining = [case for case in all_cases() if case.needs_joiner]
    elsewhere = [case for case in all_cases() if case.needs_joiner or case.needs_guardian]
    others = [case for case in all_cases() if case not in elsewhere]
    return [
        Room(wanted(joining), options.peers, options.mib, durable=False, outer=FORGETFUL),
        Room(wanted(others), options.peers, options.mib),
        Room(wanted(mid_transfer()), 3, 16),
        Room(wanted(DOUBLES), 5, options.mib),
    ]


class RoundSweep(Sweep[Case | Double, FaultGroup, Outcome]):
    """Room by room."""

    async def play(self, group: FaultGroup, case: Case | Double) -> Outcome:
        playing = play(group, case) if isinstance(case, Case) else play_double(group, case)
        outcome = await playing
        print(outcome, flush=True)
        return outcome

    async def run(self, room: Room) -> None:
        """All of a room."""
        await self.through(room.faults, lambda folder: room.group(folder, self.nursery))

    def summary(self) -> dict[str, object]:
        """Figures by action, and what was not as promised."""
        found: dict[str, object] = {"cases": len(self.played) + len(self.failed)}
        for action in Action:
            if of := [outcome for outcome in self.played if outcome.case.action is action]:
                found[action.value] = figures(of)
        found["missed"] = [f"{o.case}: {miss}" for o in self.played for miss in o.misses()]
        return found | self.ends()


async def sweep(nursery: Nursery, options: argparse.Namespace) -> RoundSweep:
    """Everything that was asked for."""
    sweep = RoundSweep(nursery, verbose=options.verbose)
    for room in rooms(options):
        await sweep.run(room)
    return sweep


def main() -> None:
    """Play what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--mib", type=int, default=1, help="fp32 bytes of the stage")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--json", action="store_true", help="print the summary as the last line")
    parser.add_argument("--verbose", action="store_true", help="the whole story of a failure")
    options = parser.parse_args()
    with Nursery() as nursery:
        done = asyncio.run(sweep(nursery, options))
    found = done.summary()
    print("\n".join(table(done.played)))
    print(json.dumps(found) if options.json else f"missed: {found['missed']}\nfailed: {found['failed']}")
    raise SystemExit(1 if found["failed"] or found["missed"] else 0)


if __name__ == "__main__":
    main()
