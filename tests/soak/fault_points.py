"""Every fault point times every action, on real processes: `python tests/soak/fault_points.py --json`.

A group of workers (mutual TLS on loopback, real membership, fp32 on the wire) plays one case after another:
a clean round, the fault, the others' commit, everybody's return, two more rounds, then P1 and P4. A line a
case: seconds from the blow to the others' COMMIT, their bytes by those of the clean round, and how the one
that was struck came back. Goals: 3 s after a kill, 6 s after a freeze, 1.05 times the bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fault_cases import FORGETFUL, Outcome, play
from fault_group import FaultGroup, fault_spec
from fault_replica import Nursery
from fault_table import Case, all_cases

from shoal.protocol.faults import Action

GOALS_S = {Action.KILL: 3.0, Action.FREEZE: 6.0}


@dataclass(frozen=True, slots=True)
class Failure:
    """A promise that was broken."""

    case: Case
    why: str


class Sweep:
    """Plays cases; a group that was broken, or told lies, is followed by a new one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.results: list[Outcome | Failure] = []

    async def run(self, cases: Iterable[Case], nursery: Nursery) -> None:
        cases = list(cases)
        for fits in (lambda case: case.needs_joiner, lambda case: not case.needs_joiner):
            waiting = [case for case in cases if fits(case)]
            while waiting:
                waiting = await self._run_group(waiting, nursery)

    async def _run_group(self, cases: list[Case], nursery: Nursery) -> list[Case]:
        """Returns the cases that are left."""
        size = self._options.mib << 18
        outer = {"part_bytes": max(1 << 16, size // 4), **(FORGETFUL if cases[0].needs_joiner else {})}
        with tempfile.TemporaryDirectory() as folder:
            spec, peers = fault_spec(outer=outer), self._options.peers
            durable = not cases[0].needs_joiner  # a joiner that comes again would have the snapshot
            group = FaultGroup(Path(folder), nursery, peers, spec, size=size, durable=durable)
            async with group:
                for index, case in enumerate(cases):
                    try:
                        self._note(await play(group, case))
                    except (AssertionError, TimeoutError, ConnectionError, RuntimeError) as error:
                        self._note(Failure(case, f"{type(error).__name__}: {error}"))
                        return cases[index + 1 :]
                    if case.tells_lies:
                        return cases[index + 1 :]
        return []

    def _note(self, result: Outcome | Failure) -> None:
        self.results.append(result)
        match result:
            case Failure(case, why):
                print(f"{case!s:36} FAILED {why if self._options.verbose else why[:200]}", flush=True)
            case Outcome(case, struck, seconds, ratio, came_back):
                late = " LATE" if seconds > GOALS_S.get(case.action, seconds) else ""
                spent = f"{ratio:.3f}" if ratio is not None else "  -  "
                print(
                    f"{case!s:36} {struck:8} {seconds:6.2f} s{late:5} bytes {spent} {came_back}", flush=True
                )


def summary(results: Sequence[Outcome | Failure]) -> dict[str, object]:
    """Figures by action, and what was not as promised."""
    figures: dict[str, object] = {"cases": len(results)}
    played = [result for result in results if isinstance(result, Outcome)]
    for action in Action:
        seconds = sorted(outcome.seconds for outcome in played if outcome.case.action is action)
        if seconds:
            figures[action.value] = {
                "cases": len(seconds),
                "seconds_median": round(seconds[len(seconds) // 2], 3),
                "seconds_max": round(seconds[-1], 3),
            }
    ratios = [o.bytes_ratio for o in played if o.bytes_ratio is not None and o.case.action is Action.KILL]
    figures["bytes_ratio_max_after_kill"] = round(max(ratios, default=0.0), 3)
    figures["late"] = [str(o.case) for o in played if o.seconds > GOALS_S.get(o.case.action, o.seconds)]
    figures["failed"] = [str(result.case) for result in results if isinstance(result, Failure)]
    return figures


def main() -> None:
    """Play what was asked for; exits with 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--mib", type=int, default=1, help="fp32 bytes of the stage")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="print the summary as the last line")
    parser.add_argument("--verbose", action="store_true", help="the whole story of a failure")
    options = parser.parse_args()
    sweep = Sweep(options)
    with Nursery() as nursery:
        asyncio.run(sweep.run((case for case in all_cases() if options.only in str(case)), nursery))
    found = summary(sweep.results)
    print(json.dumps(found) if options.json else f"failed: {found['failed']}\nlate: {found['late']}")
    raise SystemExit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
