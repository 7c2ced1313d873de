"""What a swarm could do at best: the yardstick of both kinds of simulation. Pure.

The linear programme: peers p of speed v_p give shares x_ps of their time to stages s of cost c_s;

    maximise R   with   sum_p x_ps v_p / c_s >= R for each s,   sum_s x_ps <= 1 for each p.

Weighting the first constraints by c_s gives R * sum c_s <= sum v_p, and x_ps = c_s / sum c_s for everybody
attains it: the optimum is R = sum v_p / sum c_s. No assignment of whole peers to stages does better.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def ideal_rate(speeds: Iterable[float], costs: Sequence[float]) -> float:
    """Micro-batches a second of these peers; `costs`: seconds at each stage at speed 1."""
    return sum(speeds) / sum(costs)


def capacities(placed: Iterable[tuple[int, float]], costs: Sequence[float]) -> tuple[float, ...]:
    """Micro-batches a second of each stage, given (stage, speed) of its peers; the least is the swarm's."""
    found = [0.0] * len(costs)
    for stage, speed in placed:
        found[stage] += speed / costs[stage]
    return tuple(found)


def ideal_work(lives: Iterable[tuple[float, float, float]], begin_s: float, end_s: float) -> float:
    """Speed times seconds within [begin_s, end_s], of lives (speed, ready_s, gone_s).

    Ready is a peer once it can have downloaded a stage, however long it looks around besides.
    """
    return sum(
        speed * max(0.0, min(gone_s, end_s) - max(ready_s, begin_s)) for speed, ready_s, gone_s in lives
    )
