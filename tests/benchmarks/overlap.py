"""Inner steps beside rounds on a link just wide enough: `python tests/benchmarks/overlap.py --json`.

Real peer processes (mutual TLS on loopback, real membership) whose uplinks are held to a rate, as `--upload`
does: with it a peer's share of one fragment's round takes --fill of the time between two rounds. Each peer's
compute lane is kept busy with inner steps, in pieces like micro-batches that hold the lane and sleep; rounds
copy and rebase on the same lane. A line for each number of fragments:

idle_share: of the time, in which the lane was at no inner step; the most of any peer. stretched: how much
longer than told a piece took, since the machine was busy. window_over_share: the most bytes that a peer sent
in rounds in any window as long as rounds are apart, over what a whole round takes, divided by the fragments.
rounds_kept: rounds committed while that was measured, of those that were due. At the end all bytes are equal,
and the ledger proves that every step is in once. Exit status 1: 3 % idle, or more than 1.10 of the share.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fault_group import FaultGroup, fault_spec
from fault_orders import JsonObject
from fault_replica import Nursery

GOAL_IDLE = 0.03
GOAL_WINDOW = 1.10
SETTLE_S = 60.0
FP32 = 4  # bytes


async def measure(nursery: Nursery, fragments: int, options: argparse.Namespace) -> JsonObject:
    """One row."""
    size, peers = options.mib << 18, options.peers
    apart = options.steps_apart  # inner steps between rounds
    window_s = apart * options.step_s
    whole_bytes = 2 * (peers - 1) / peers * FP32 * size  # deltas to owners, and means to the others
    share_bytes = whole_bytes / fragments
    upload = share_bytes / (options.fill * window_s)
    outer = {
        "fragments": fragments,
        "inner_steps": apart * fragments,
        "part_bytes": options.part_kib << 10,
        "round_deadline_s": 60.0,
        "snapshot_every": 100,
    }
    course = {
        "steps": apart * (options.warm_up + options.rounds),
        "warm_up": apart * options.warm_up,
        "pieces": options.pieces,
        "piece_s": options.step_s / options.pieces,
        "window_s": window_s,
    }
    limit_s = 4 * course["steps"] * options.step_s + SETTLE_S
    with tempfile.TemporaryDirectory() as folder:
        spec = fault_spec(outer=outer)
        group = FaultGroup(Path(folder), nursery, peers, spec, size=size, upload_bytes_per_s=upload)
        async with group:
            asked = (replica.ask("train", limit_s=limit_s, **course) for replica in group.members)
            found = await asyncio.gather(*asked)
            for replica, answer in zip(group.members, found, strict=True):
                replica.steps = answer["inner_steps"]
            await group.members[0].ask("hand_in", limit_s=limit_s)
            await group.reach(max(replica.height for replica in group.members))
            await group.assert_equal()
            await group.assert_every_step_is_in_once()
    return {
        "system": "shoal",
        "peers": peers,
        "mib": options.mib,
        "fragments": fragments,
        "fill": options.fill,
        "upload_mbit": round(upload * 8e-6, 2),
        "seconds_between_rounds": window_s,
        "idle_share": round(max(answer["idle_share"] for answer in found), 4),
        "stretched": round(max(answer["stretched"] for answer in found), 4),
        "window_over_share": round(max(answer["window_bytes_most"] for answer in found) / share_bytes, 4),
        "mean_over_share": round(max(answer["window_bytes_mean"] for answer in found) / share_bytes, 4),
        "rounds_kept": round(min(answer["entries"] for answer in found) / options.rounds, 3),
        "load_average": round(os.getloadavg()[0], 1),
    }


async def rows(options: argparse.Namespace) -> bool:
    """Print all; whether the goals were met."""
    met = True
    with Nursery() as nursery:
        for fragments in map(int, options.fragments.split(",")):
            row = await measure(nursery, fragments, options)
            met &= row["idle_share"] < GOAL_IDLE and row["window_over_share"] <= GOAL_WINDOW
            print(json.dumps(row) if options.json else table_row(row), flush=True)
    return met


def table_row(row: JsonObject) -> str:
    """For people."""
    return (
        f"{row['fragments']:2} fragments, {row['upload_mbit']:7.2f} Mbit/s:"
        f" idle {100 * row['idle_share']:.2f} %, window {row['window_over_share']:.3f} of a share,"
        f" {100 * row['rounds_kept']:.0f} % of the rounds kept"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--mib", type=int, default=8, help="of fp32 at every peer; fp32 on the wire, too")
    parser.add_argument("--fragments", default="4", help="one row for each of these")
    parser.add_argument("--fill", type=float, default=0.9, help="share of the time that a round has to send")
    parser.add_argument("--step-s", type=float, default=1.0, help="of one inner step")
    parser.add_argument("--steps-apart", type=int, default=4, help="inner steps between rounds")
    parser.add_argument("--pieces", type=int, default=32, help="of an inner step")
    parser.add_argument("--part-kib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=3, help="rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    raise SystemExit(0 if asyncio.run(rows(options)) else 1)


if __name__ == "__main__":
    main()
