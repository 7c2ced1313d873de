"""The whole protocol under churn, in virtual time: `python tests/soak/swarm.py --seeds 0-200`.

Every seed is a swarm of its own: 50 peers that stay a minute or two, half of them killed, 60 virtual seconds
(after 15 in which they join). Promises P1 to P5 are watched throughout (`node/simulate/promises.py`). One
line a seed; what breaks prints with the command that tells it again. Exit code 1 if something did.

`--peers 5 --stages 3`: few peers, which hold several stages each. `--peers 8 --window 2 --seconds 300`: few
that move between stages, and stages whose last replica goes every now and then.
"""

from __future__ import annotations

import argparse
import time

from shoal.compression import kernels
from shoal.node.simulate.options import Options
from shoal.node.simulate.run import simulate_run
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES


def story(seed: int, peers: int, duration_s: float, stages_most: int) -> Options:
    return Options(
        peers=peers,
        duration_s=duration_s,
        warmup_s=15.0,
        seed=seed,
        session_s=60.0 + 30.0 * (seed % 3),
        micro_batch_s=(1.0, 2.0, 4.0)[seed % 7 % 3],
        stages_most=stages_most,
    )


def spec(seed: int, window_s: float) -> RunSpec:
    values = TEMPLATES["small"].model_dump()
    values["stages"] |= {"count": 2 + seed % 4, "rebalance_window_s": window_s}
    values["inner"] |= {"in_flight": 4, "optimizer": "sgd", "inner_tokens": 2048}
    values["outer"] |= {"inner_steps": 4}
    return RunSpec.model_validate(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0-200", help="first-last, the last one not included")
    parser.add_argument("--peers", type=int, default=50)
    parser.add_argument("--stages", type=int, default=1, help="that a peer may hold at once")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--window", type=float, default=15.0, help="seconds between looks whether to move")
    parser.add_argument("--until", type=float, default=0.0, help="begin no seed after so many CPU seconds")
    options = parser.parse_args()
    kernels.warm()  # what real peers encode with
    first, last = map(int, options.seeds.split("-"))
    failed = done = 0
    for seed in range(first, last):
        if options.until and time.process_time() > options.until:
            break
        outcome = simulate_run(
            spec(seed, options.window), story(seed, options.peers, options.seconds, options.stages)
        )
        done += 1
        failed += bool(outcome.broken)
        figures = outcome.to_json()
        names = ["stages", "micro_batches", "joins", "kills", "leaves", "moves", "retries", "adopted", "lost"]
        names += ["rounds", "forks", "setbacks", "cpu_s"]
        line = " ".join(f"{name} {figures[name]}" for name in names)
        print(f"seed {seed}: {line}", flush=True)
        for what in outcome.broken:
            print(f"  BROKEN {what}", flush=True)
        if outcome.broken:
            print(
                f"  python tests/soak/swarm.py --peers {options.peers} --stages {options.stages} "
                f"--seconds {options.seconds:g} --window {options.window:g} --seeds {seed}-{seed + 1}"
            )
    print(f"{done} seeds, {failed} broken")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
