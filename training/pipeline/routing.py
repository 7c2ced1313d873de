"""Which replica of the next stage gets a micro-batch: a pure policy.

Expected finish of work w at replica p (notes: pipeline.md, D1; SWARM's rule without its faults):

    E_p(w) = rtt_p / 2 + bytes / bandwidth_p + backlog_p + (own in flight + 1) · service_p

Backlog is what p last reported; our own micro-batches in flight there since are added, since no report
covers them. A few candidates are drawn in proportion to their rate, and the one that finishes first is
taken: with all drivers looking at the same numbers, taking the best of all would send everyone to one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SAMPLED = 3
_UNKNOWN_SERVICE_S = 0.05  # of a replica never measured; a guess that its first answer replaces


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica as its caller sees it."""

    peer: str
    rtt_s: float
    backlog_s: float
    in_flight: int  # ours, unanswered
    service_s: float  # measured time for one micro-batch; 0: unknown


def expected_finish_s(candidate: Candidate) -> float:
    service_s = candidate.service_s or _UNKNOWN_SERVICE_S
    return candidate.rtt_s / 2 + candidate.backlog_s + (candidate.in_flight + 1) * service_s


def choose(candidates: Sequence[Candidate], rng: random.Random) -> Candidate | None:
    """The replica to ask, or None without candidates. Equal inputs and rng state give equal answers."""
    if not candidates:
        return None
    pool = sorted(candidates, key=lambda candidate: candidate.peer)
    rates = [1.0 / (candidate.service_s or _UNKNOWN_SERVICE_S) for candidate in pool]
    drawn = rng.choices(pool, weights=rates, k=min(SAMPLED, len(pool)))
    return min(drawn, key=expected_finish_s)
