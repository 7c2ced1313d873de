"""Random faults against rounds, in virtual time: `python tests/soak/rounds.py --seeds 0-2000`.

Every seed is a story of its own (`story.py`): a group of 3 to 12 peers, its links, codecs and fragments, and
faults from a kill to a partition. Runs on all cores; a failure prints its story and the command that tells it
again. Exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path

from shoal.compression import kernels

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from story import outcome  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0-2000", help="first-last, the last one not included")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    first, last = map(int, options.seeds.split("-"))
    begin_s = time.perf_counter()
    counts: Counter[str] = Counter()
    _begin()
    context = multiprocessing.get_context("fork")  # what is imported and compiled by now is not again
    with context.Pool(options.processes) as pool:
        for seed, result, told in pool.imap_unordered(outcome, range(first, last), chunksize=4):
            counts[result.partition(":")[0]] += 1
            if result.startswith("FAILED"):
                print(f"seed {seed} {result}")
                print("\n".join(f"    {line}" for line in told))
                print(f"  python tests/soak/rounds.py --processes 1 --seeds {seed}-{seed + 1}", flush=True)
    print(f"{dict(sorted(counts.items()))} in {time.perf_counter() - begin_s:.0f} s")
    raise SystemExit(1 if counts["FAILED"] else 0)


def _begin() -> None:
    """Compiled kernels take a fifth of the time away, whatever the machine.

    The collector looks at what stories leave, seldom, and not at what torch brought.
    """
    kernels.warm()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


if __name__ == "__main__":
    main()
