"""Which replica of the next stage gets a micro-batch, and when a second one is asked: pure policies.

Expected finish of work w, of so many bytes there and back, at replica p (notes: pipeline.md, D1; SWARM's
rule without its faults):

    E_p(w) = rtt_p + bytes / bandwidth_p + backlog_p + w / rate_p

Backlog is what p last reported, less the time since, and what we have sent there since. Two things differ
when replicas are compared. All of ours under way there count, since each comes back for its backward; and
w / rate counts half: all of it gives this micro-batch its earliest finish, none gives the swarm most work
done, for few are in flight and whatever waits at a fast replica while a slow one idles is wasted. (Virtual
time, a replica 4 times slower, 8 in flight: share of that one 0.04 by E_p, 0.17 so, 0.2 its speed's.)

A replica whose speed is not known yet is asked before those it is known of: what it claims may be wrong (a
process's first micro-batch takes many times what the next ones take), and if that kept others from asking
it, nobody would ever learn better. Its slow start keeps such a trial to one micro-batch at a time.

A few candidates are drawn in proportion to their rate, and the best of them is taken: with all callers
looking at the same numbers, taking the best of all would send everyone to one.

Plain functions of tuples and numbers, so that the simulator of large swarms can compile them as they are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple, Protocol

SAMPLED = 3
OWN_WORK_OFF = 0.5
BUSY_SERVICES = 4.0  # micro-batches queued, weight gradients that fill gaps included
HEAD_START_SERVICES = 32.0  # a micro-batch's age is its caller's claim: it gets nobody further ahead
YOUNGER_SERVICES = 2.0  # of these, besides, for who is older than what is queued
AGAIN_SERVICES = BUSY_SERVICES + YOUNGER_SERVICES  # ahead of a queue that filled while its replica had it
UNKNOWN_BUSY_S = 0.5  # until a lane has finished its first piece of work, ask so often
HEDGE_QUANTILE = 0.95
HEDGE_SAMPLES = 20  # fewer say nothing about a 95th percentile, and until then ...
HEDGE_PRIOR, HEDGE_PRIOR_LEAST_S = 4.0, 2.0  # ... so many times what was expected are late, and not below
HEDGE_GRACE_S = 0.1  # scheduling noise: below it a second call costs more than it saves
LANE_STALL_S = 5.0  # a lane that finishes nothing for so long, ...
UNKNOWN_STALL_S = 15.0  # ... or where nobody knows yet how long a piece of work takes there, and ...
LANE_STALL_SERVICES = 4.0  # ... for so many of its usual micro-batches, stands still though its loop answers


class Chance(Protocol):
    """What policies draw from: `random.Random`, or numpy's generator in the simulator."""

    def random(self) -> float: ...

    def uniform(self, a: float, b: float, /) -> float: ...


class Candidate(NamedTuple):
    """A replica as its caller sees it."""

    peer: str
    rtt_s: float
    seconds_per_byte: float  # of the link, there and back; 0: unknown, or too fast to matter
    backlog_s: float  # reported, less the time since
    in_flight: int  # our micro-batches under way there
    sent_since: int  # of these, sent after that report
    service_s: float  # lane time of one micro-batch, above 0
    proven: bool = True  # that service_s is measured, and of late


def expected_finish_s(candidate: Candidate, payload_bytes: int) -> float:
    """Seconds until the replica has done its own part of a micro-batch of so many bytes, there and back."""
    transfer_s = candidate.rtt_s + payload_bytes * candidate.seconds_per_byte
    return transfer_s + candidate.backlog_s + (candidate.sent_since + 1) * candidate.service_s


def cost_s(candidate: Candidate, payload_bytes: int) -> float:
    """What replicas are compared by; see the module."""
    finish_s = expected_finish_s(candidate, payload_bytes)
    unseen = candidate.in_flight - candidate.sent_since
    committed_s = max(candidate.backlog_s, unseen * candidate.service_s)
    off = OWN_WORK_OFF if candidate.proven else 1.0
    return finish_s - candidate.backlog_s + committed_s - off * candidate.service_s


def choose(candidates: Sequence[Candidate], payload_bytes: int, rng: random.Random) -> Candidate | None:
    """The replica to ask, or None without candidates. Equal inputs and rng state give equal answers."""
    in_order = sorted(candidates, key=lambda candidate: candidate.peer)
    drawn = [in_order[index] for index in sample([candidate.service_s for candidate in in_order], rng)]
    place = best(drawn, payload_bytes)
    return drawn[place] if drawn else None


def sample(services_s: Sequence[float], rng: Chance) -> list[int]:
    """Which candidates are compared: at most SAMPLED, drawn in proportion to their rates.

    Without replacement: Efraimidis and Spirakis 2006.
    """
    keys = [-math.log(1.0 - rng.random()) * service_s for service_s in services_s]
    drawn: list[int] = []
    for _ in range(min(SAMPLED, len(keys))):
        least = -1
        for index, key in enumerate(keys):
            if (least < 0 or key < keys[least]) and index not in drawn:
                least = index
        drawn.append(least)
    return drawn


def best(sampled: Sequence[Candidate], payload_bytes: int) -> int:
    """The place of the one of least cost, of those that would not turn us away if there are any.

    Of equals the first; -1 where nobody is.
    """
    chosen, turns_away, least_s = -1, True, math.inf
    for place, one in enumerate(sampled):
        full, seconds = is_full(one), cost_s(one, payload_bytes)
        if chosen < 0 or (turns_away and not full) or (full == turns_away and seconds < least_s):
            chosen, turns_away, least_s = place, full, seconds
    return chosen


def is_full(candidate: Candidate) -> bool:
    """Whether it would answer busy, as far as it is known: a refusal costs a round trip, or more."""
    backlog_s = candidate.backlog_s + candidate.sent_since * candidate.service_s
    return busy_for_s(0, backlog_s, candidate.service_s) > 0.0


def busy_for_s(queued: int, backlog_s: float, service_s: float, younger_s: float = 0.0) -> float:
    """What a replica answers that is full: seconds until its queue is shorter again; 0: it takes more.

    The queue keeps a lane busy until the next micro-batch comes; what waits longer had better wait where it
    can still go elsewhere. (Virtual time, 1,000 peers, 24 stages, 10 s a micro-batch, sessions of 30 min,
    mean of seeds 1 to 3: 0.877 of the ideal rate with queues of two micro-batches, 0.906 with four, of which
    weight gradients, that nobody waits for, are a good part.)
    `queued`: pieces of work, which count while its speed is unknown. `younger_s`: work queued besides, that
    this micro-batch would go ahead of; there is some room more for those who are older than the rest.
    """
    if service_s == 0.0:
        return UNKNOWN_BUSY_S if queued >= BUSY_SERVICES else 0.0
    excess_s = backlog_s + max(0.0, younger_s - YOUNGER_SERVICES * service_s) - BUSY_SERVICES * service_s
    return excess_s + service_s / 2 if excess_s > 0.0 else 0.0


def waiting_since(now: float, age_s: float, service_s: float, again: bool = False) -> float:
    """From when on a micro-batch counts as waiting in a queue where the oldest goes first.

    `age_s`: since its driver began it, as the caller says. What went round trouble is older than the rest.
    `again`: a replica failed with it.
    """
    age_s = max(age_s, 0.0) + (AGAIN_SERVICES * service_s if again else 0.0)
    return now - min(age_s, HEAD_START_SERVICES * service_s)


def hedge_after_s(expected_s: float, ratios: Sequence[float]) -> float:
    """How long a replica's own part may take before another one is asked, too.

    `ratios`: of the latest answers, what their replicas' own parts took to what was expected.
    """
    if len(ratios) < HEDGE_SAMPLES:
        return max(HEDGE_PRIOR * expected_s, HEDGE_PRIOR_LEAST_S)
    ordered = sorted(ratios)
    late = ordered[min(len(ordered) - 1, math.ceil(HEDGE_QUANTILE * len(ordered)) - 1)]
    return expected_s * max(late, 1.0) + HEDGE_GRACE_S


def stands_still(idle_s: float, service_s: float, known: bool = True) -> bool:
    """Whether a lane with work is stuck, given for how long its count of finished work has not grown.

    `known`: that `service_s` is more than a guess, and the lane has finished anything at all.
    """
    least_s = LANE_STALL_S if known else UNKNOWN_STALL_S
    return idle_s >= max(least_s, LANE_STALL_SERVICES * service_s)
