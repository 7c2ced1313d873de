"""A large swarm by its policies, ours and others': `python tests/benchmarks/crowd.py --peers 1000`.

24 stages, micro-batches of 10 s mean lane time, machines up to 8 times faster than others, sessions of 30
minutes on average, half of them ended by a kill. All rules meet the same machines, links and sessions. Prints
one line of JSON for each simulation, and in the end a table: throughput to the ideal's, mean over the seeds.
`--rules shoal --peers 10000 --hours 1 --seeds 1-1 --in-flight 128` is the full size: the fastest drivers
finish three micro-batches in 10 s and want more under way. SWARM's rules and chance turn nobody away: what
their hops hold is not limited.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import get_args

from shoal.node.simulate.options import Options, Recovery, Router
from shoal.node.simulate.run import simulate_run
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES

MICRO_BATCH_S, SESSION_S, WARMUP_S = 10.0, 1800.0, 900.0
RULES: dict[str, tuple[Router, Recovery]] = {
    "shoal, work behind a dead hop adopted": ("shoal", "adopt"),
    "shoal, work behind a dead hop redone": ("shoal", "redo"),
    "SWARM's rules, adopted": ("swarm", "adopt"),
    "random routing, adopted": ("random", "adopt"),
}


def spec(in_flight: int) -> RunSpec:
    """1.3 MB a hop."""
    values = TEMPLATES["small"].model_dump()
    values["model"] |= {"layers": 24}
    values["stages"] |= {"count": 24}
    values["inner"] |= {"in_flight": in_flight}
    values["limits"] |= {"undecided_micro_batches": 512, "hop_timeout_s": 3600.0, "undecided_ttl_s": 1200.0}
    return RunSpec.model_validate(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--seeds", default="1-3", help="first-last")
    parser.add_argument("--in-flight", type=int, default=64, help="micro-batches of a driver")
    parser.add_argument("--rules", default="all", choices=["all", *get_args(Router)])
    arguments = parser.parse_args()
    first, last = map(int, arguments.seeds.split("-"))
    rows = []
    for name, (router, recovery) in RULES.items():
        if arguments.rules not in ("all", router):
            continue
        shares = []
        for seed in range(first, last + 1):
            options = Options(
                peers=arguments.peers,
                duration_s=arguments.hours * 3600.0,
                warmup_s=WARMUP_S,
                seed=seed,
                session_s=SESSION_S,
                micro_batch_s=MICRO_BATCH_S,
                policies_only=True,
                router=router,
                recovery=recovery,
            )
            figures = simulate_run(spec(arguments.in_flight), options).to_json()
            shares.append(float(str(figures["throughput_of_ideal"])))
            print(json.dumps(figures), flush=True)
        rows.append(f"| {name} | {' '.join(f'{s:.3f}' for s in shares)} | {statistics.fmean(shares):.3f} |")
    print("\n".join(("| Rules | of the ideal, seed by seed | mean |", "|---|---|---|", *rows)))


if __name__ == "__main__":
    main()
