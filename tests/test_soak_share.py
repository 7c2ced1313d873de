"""A share of the soaks: of rounds, random faults against groups of 3 to 12 peers; of swarms, few that move.

Each seed is its own story; `python tests/soak/rounds.py --processes 1 --seeds N-N+1` tells one of rounds
again, `python tests/soak/swarm.py --peers 8 --window 2 --seconds 110 --seeds N-N+1` one of a swarm. First
those that failed once, though a change of what is sent makes other stories of the same seeds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "soak"))

from story import outcome
from swarm import spec, story

from shoal.node.simulate.run import simulate_run

FAILED_ONCE = (39, 64, 86, 97, 824, 1260, 1369, 1480, 1443, 539, 1509)
SHARE = tuple(range(2000, 2056))
PIECE = 4


def pieces(seeds: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [seeds[i : i + PIECE] for i in range(0, len(seeds), PIECE)]


@pytest.mark.parametrize("seeds", pieces(FAILED_ONCE + SHARE), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_whatever_happens_to_a_group_its_promises_hold(seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        _, result, told = outcome(seed)
        print(f"seed {seed}: {result}", *told, sep="\n  ")
        assert not result.startswith("FAILED"), f"seed {seed}: {result}"


@pytest.mark.parametrize("seed", [10, 35])
def test_few_peers_that_come_move_and_die_keep_one_log_a_stage(seed: int) -> None:
    """No network is cut here. These forked once: by a lone replica that left, and by one of two."""
    found = simulate_run(spec(seed, window_s=2.0), story(seed, peers=8, duration_s=110.0, stages_most=1))
    print(f"seed {seed}: {found.to_json()}")
    assert found.broken == []
    assert found.forks == 0
    assert found.joins > 5
