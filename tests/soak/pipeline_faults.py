"""Every point of the pipeline times every blow, on real processes: `tests/soak/pipeline_faults.py --json`.

Then downloads of a stage's state by a newcomer, and moves of a replica from one stage to the next, amid all
that: every point of those times every blow, to who comes, to a donor, to a bystander (`transfer_table`).

Three stages of two replicas (mutual TLS on loopback, real membership, whole trainers with a tiny model) train
all the time, and play one case after another: the blow, the living drivers decide all that they had in
flight, everybody comes back and works, then P1 (equal bits), P2 (every applied micro-batch once and decided,
what is missing counted), P4 (checkpoints on disk are whole). P5 is that it goes on at all. A line a case.
Goals: 2 s for a re-route (two figures: until what a replica had was with another one that took it, counted
from the blow, and until that one had done it, counted from the failure that its caller saw), 15 s until a
stage that was emptied trains again. Exit status 1: a promise was broken (FAILED), or a point was not passed,
or an emptied stage took longer (LATE).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fault_orders import JsonObject
from fault_replica import Nursery
from fault_sweep import Sweep
from pipeline_cases import Played, play
from pipeline_group import PipelineGroup, pipeline_spec
from pipeline_table import Blow, Case, all_cases
from transfer_cases import SECTIONS, play_transfer
from transfer_table import Scene, Transfer, all_transfers

REROUTE_S, EMPTIED_S = 2.0, 15.0
WRITES: JsonObject = {"outer": {"snapshot_every": 2}, "checkpoint": {"every_s": 1.5}}  # for points on disk


class PipelineSweep(Sweep[Case | Transfer, PipelineGroup, Played]):
    """All of them in groups of one kind."""

    async def play(self, group: PipelineGroup, case: Case | Transfer) -> Played:
        playing = play(group, case) if isinstance(case, Case) else play_transfer(group, case)
        played = await playing
        print(f"{played}{'  LATE' if is_late(played) else ''}", flush=True)
        return played

    async def run(self, cases: Sequence[Case | Transfer], **sections: JsonObject) -> None:
        """All of these, under a spec with these sections."""
        await self.through(
            cases, lambda folder: PipelineGroup(folder, self.nursery, pipeline_spec(**sections))
        )

    def summary(self) -> JsonObject:
        """Figures by blow, and what was not as promised."""
        found: JsonObject = {"cases": len(self.played) + len(self.failed)}
        for blow in Blow:
            if of := [played for played in self.played if played.case.blow is blow]:
                found[blow.value] = figures(of)
        found["late"] = [str(played.case) for played in self.played if is_late(played)]
        return found | self.ends()


def is_late(played: Played) -> bool:
    """Whether a stage that was emptied took too long to train again."""
    return played.case.blow is Blow.EMPTY and played.back_s > EMPTIED_S


def figures(of: Sequence[Played]) -> JsonObject:
    """Median and most of what was measured, and what was counted."""
    reroutes_s = [played.reroute_s for played in of if played.reroute_s]
    handed_s = [played.handed_s for played in of if played.reroute_s]
    return {
        "cases": len(of),
        "decided_again_s": _median_and_most([played.seconds for played in of]),
        "handed_over_s": _median_and_most(handed_s),
        "handed_over_past_goal": sum(seconds > REROUTE_S for seconds in handed_s),
        "reroute_s": _median_and_most(reroutes_s),
        "reroutes_over_goal": sum(seconds > REROUTE_S for seconds in reroutes_s),
        "back_s": _median_and_most([played.back_s for played in of]),
        "decided": sum(played.audit.decided for played in of),
        "applied": sum(played.audit.applied for played in of),
        "lost_and_counted": sum(played.audit.excused for played in of),
    }


def _median_and_most(values: Sequence[float]) -> list[float]:
    return [round(statistics.median(values), 2), round(max(values), 2)] if values else []


async def sweep(nursery: Nursery, options: argparse.Namespace) -> PipelineSweep:
    """Everything that was asked for."""
    sweep = PipelineSweep(nursery, verbose=options.verbose)
    cases = [case for case in all_cases() if options.only in str(case)]
    transfers = [case for case in all_transfers() if options.only in str(case)]
    await sweep.run([case for case in cases if not case.needs_disk])
    await sweep.run([case for case in cases if case.needs_disk], **WRITES)
    for scene in Scene:
        await sweep.run([case for case in transfers if case.scene is scene], **SECTIONS[scene])
    return sweep


def main() -> None:
    """Play what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="print the summary as the last line")
    parser.add_argument("--verbose", action="store_true", help="the whole story of a failure")
    options = parser.parse_args()
    with Nursery() as nursery:
        done = asyncio.run(sweep(nursery, options))
    found = done.summary()
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{key}: {value}" for key, value in found.items()))
    raise SystemExit(1 if found["failed"] or found["late"] else 0)


if __name__ == "__main__":
    main()
