"""The way in: a spec and options go in, an outcome comes out. Called by `shoal simulate` and by tests."""

from __future__ import annotations

import gc

import torch

from shoal.node.simulate.options import Options
from shoal.node.simulate.outcome import Outcome, Progress
from shoal.node.simulate.policies import simulate_policies
from shoal.node.simulate.swarm import simulate_swarm
from shoal.training.spec import RunSpec

_COLLECT_AFTER = 100_000  # allocations; hardly anything here is a cycle, and looking for them takes a tenth


def simulate_run(spec: RunSpec, options: Options, progress: Progress = lambda done_s, all_s: None) -> Outcome:
    """Simulate. One thread, whatever torch was set to."""
    threads, thresholds = torch.get_num_threads(), gc.get_threshold()
    torch.set_num_threads(1)
    gc.set_threshold(_COLLECT_AFTER)
    try:
        simulate = simulate_swarm if options.mode == "full" else simulate_policies
        return simulate(spec, options, progress)
    finally:
        torch.set_num_threads(threads)
        gc.set_threshold(*thresholds)
