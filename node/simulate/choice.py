"""Whose rules choose the next replica in the policy simulation: ours, SWARM's, or chance.

Ours are the functions that the pipeline calls (`routing`, `standing`), fed with what a caller would know.
SWARM's is its interleaved weighted round robin with moving averages, as notes of its source describe it:
pick the least T, then T += measured seconds; a new replica enters at the least T; an error bans it. It sees
no queue and no other caller, and nobody is ever turned away.
"""

from __future__ import annotations

import math
from typing import Any

from shoal.node.simulate.tables import KNOWN_MOST, SENT_MOST, World
from shoal.training.pipeline.replicas import Replica
from shoal.training.pipeline.routing import best, busy_for_s, sample
from shoal.training.pipeline.standing import (
    Report,
    Standing,
    after_answer,
    after_failure,
    after_forward,
    after_refusal,
    as_candidate,
    is_admitted,
    is_established,
)

SHOAL, SWARM, RANDOM = 0, 1, 2
ROUTERS = {"shoal": SHOAL, "swarm": SWARM, "random": RANDOM}
BEAT_S = 1.0  # between two heartbeats
_SMOOTHING = 0.1  # SWARM's


# --- who knows whom


def place_of(w: World, caller: int, replica: int) -> int:
    """Among those that a caller knows; -1: it is not."""
    row = w.nodes[caller].row
    if row >= 0:
        for place in range(w.nodes[caller].known):
            if w.known[row, place] == replica:
                return place
    return -1


def meet(w: World, caller: int, replica: int) -> bool:
    """The caller hears of a replica; False: of too many."""
    one, other = w.nodes[caller], w.nodes[replica]
    row, place = one.row, one.known
    if row < 0 or place == KNOWN_MOST or place_of(w, caller, replica) >= 0:
        return False
    due = math.inf
    for earlier in range(place):
        due = min(due, w.pairs[row, earlier].due)
    one.known = place + 1
    w.known[row, place] = replica
    pair = w.pairs[row, place]
    write(pair, Standing(0, 0.0, 0.0, 0.0, -math.inf, 0, -math.inf, 1, False, False))
    pair.rtt_s = 2 * (one.latency_s + other.latency_s)
    pair.sent, pair.seconds = 0, 1.0  # a micro-batch, until measured
    pair.due = due if place else 0.0
    return True


def part(w: World, caller: int, replica: int) -> None:
    """It is gone."""
    place = place_of(w, caller, replica)
    if place < 0:
        return
    one = w.nodes[caller]
    one.known -= 1
    row, last = one.row, one.known
    if place != last:
        w.known[row, place] = w.known[row, last]
        w.pairs[row, place] = w.pairs[row, last]
        count = w.pairs[row, last].sent
        w.sent[row, place, :count] = w.sent[row, last, :count]


def read(pair: Any) -> Standing:
    return Standing(
        pair.measured,
        pair.service_s,
        pair.seconds_per_byte,
        pair.backlog_s,
        pair.reported_s,
        pair.failures,
        pair.closed_until_s,
        pair.window,
        pair.crowded != 0,
        False,
    )


def write(pair: Any, standing: Standing) -> None:
    pair.measured = standing.measured
    pair.service_s = standing.service_s
    pair.seconds_per_byte = standing.seconds_per_byte
    pair.backlog_s = standing.backlog_s
    pair.reported_s = standing.reported_s
    pair.failures = standing.failures
    pair.closed_until_s = standing.closed_until_s
    pair.window = standing.window
    pair.crowded = 1 if standing.crowded else 0


# --- what is known of a replica


def backlog_s(w: World, node: int, now: float) -> float:
    """Time to finish what runs and is queued, and the backward of a forward, as `lane.LaneLoad` tells it."""
    one, queues = w.nodes[node], w.queues[node]
    pieces = 3 * queues[0, 2] + 2 * queues[1, 2] + one.weights + max(one.busy - 1, 0)
    return float(pieces * one.service_s / 3 + max(0.0, one.free_s - now))


def as_replica(w: World, pair: Any, node: Any, now: float) -> Replica:
    """As its last heartbeat had it."""
    one = w.nodes[node]
    if now - one.beat_s >= BEAT_S:
        one.beat_s, one.beat_backlog_s = now, backlog_s(w, node, now)
    return Replica(node, pair.rtt_s, one.beat_backlog_s, one.service_s, one.beat_s, 0.0)


def busy_s(w: World, node: int, now: float) -> float:
    """For how long a replica turns a caller away that has just come; 0: not at all."""
    if w.rules.router != SHOAL:
        return 0.0
    queues = w.queues[node]
    queued = queues[0, 2] + queues[1, 2] + w.nodes[node].weights
    return busy_for_s(queued, backlog_s(w, node, now), w.nodes[node].service_s)


# --- the choice


def pick(w: World, rng: Any, caller: int, now: float) -> int:
    """The place of the replica to ask now; -1 while nobody may be asked."""
    count = w.nodes[caller].known
    if count == 0:
        return -1
    row = w.nodes[caller].row
    if w.rules.router == RANDOM:
        return int(rng.random() * count)
    if w.rules.router == SWARM:
        least = 0
        for place in range(1, count):
            if w.pairs[row, place].due < w.pairs[row, least].due:
                least = place
        w.pairs[row, least].due += w.pairs[row, least].seconds
        return least
    return _pick_ours(w, rng, row, count, now)


def _pick_ours(w: World, rng: Any, row: int, count: int, now: float) -> int:
    pairs = w.pairs[row]
    all_new = True
    for place in range(count):
        all_new = all_new and not is_established(read(pairs[place]))
    roomy = [
        place
        for place in range(count)
        if pairs[place].sent < SENT_MOST and is_admitted(read(pairs[place]), now, pairs[place].sent, all_new)
    ]
    if len(roomy) <= 1:
        return roomy[0] if len(roomy) else -1
    services_s = [pairs[p].service_s or w.nodes[w.known[row, p]].service_s for p in roomy]
    drawn = [roomy[index] for index in sample(services_s, rng)]
    candidates = [
        as_candidate(
            read(pairs[p]),
            as_replica(w, pairs[p], w.known[row, p], now),
            w.sent[row, p, : pairs[p].sent],
            now,
            w.nodes[w.known[row, p]].service_s,
        )
        for p in drawn
    ]
    return drawn[best(candidates, round(2 * w.rules.hop_bytes))]


def again_s(w: World, caller: int, now: float) -> float:
    """When there may be room, if nothing is answered before."""
    soonest_s = math.inf
    row = w.nodes[caller].row
    if w.rules.router == SHOAL and row >= 0:
        for place in range(w.nodes[caller].known):
            closed_until_s = w.pairs[row, place].closed_until_s
            if closed_until_s > now:
                soonest_s = min(soonest_s, closed_until_s)
    return soonest_s


# --- what comes of it


def sent(w: World, caller: int, place: int, now: float) -> None:
    """A micro-batch is on its way."""
    row = w.nodes[caller].row
    pair = w.pairs[row, place]
    if w.rules.router == SHOAL:
        w.sent[row, place, pair.sent] = now
        pair.sent += 1


def _ended(w: World, caller: int, replica: int, sent_s: float) -> int:
    """It is not on its way any more; the replica's place, -1 if that is gone, or under others' rules."""
    place = place_of(w, caller, replica) if w.rules.router == SHOAL else -1
    if place >= 0:
        row = w.nodes[caller].row
        pair, times = w.pairs[row, place], w.sent[row, place]
        for index in range(pair.sent):
            if times[index] == sent_s:
                pair.sent -= 1
                times[index] = times[pair.sent]
                break
    return place


def passed(w: World, caller: int, replica: int) -> None:
    """It is through with a forward: its Working messages tell."""
    place = place_of(w, caller, replica) if w.rules.router == SHOAL else -1
    if place >= 0:
        pair = w.pairs[w.nodes[caller].row, place]
        write(pair, after_forward(read(pair), pair.sent))


def answered(w: World, caller: int, replica: int, now: float, sent_s: float, own_s: float) -> None:
    """Its gradient came; `own_s`: what link and replica took, without the stages behind."""
    place = _ended(w, caller, replica, sent_s)
    if place >= 0:
        one, other = w.nodes[caller], w.nodes[replica]
        per_byte = 0.5 / min(one.upload, other.download) + 0.5 / min(other.upload, one.download)
        pair = w.pairs[one.row, place]
        report = Report(other.service_s, backlog_s(w, replica, now), per_byte)
        write(pair, after_answer(read(pair), now, report))
    elif w.rules.router == SWARM:
        place = place_of(w, caller, replica)
        if place >= 0:
            pair = w.pairs[w.nodes[caller].row, place]
            pair.seconds += _SMOOTHING * (own_s - pair.seconds)


def failed(w: World, rng: Any, caller: int, replica: int, now: float, sent_s: float, died: bool) -> None:
    """No answer will come: it died, or a hop before it did."""
    place = _ended(w, caller, replica, sent_s)
    if place >= 0 and died:
        pair = w.pairs[w.nodes[caller].row, place]
        write(pair, after_failure(read(pair), now, rng))


def turned_away(
    w: World, rng: Any, caller: int, replica: int, now: float, sent_s: float, retry_after_s: float
) -> None:
    """It was busy."""
    place = _ended(w, caller, replica, sent_s)
    if place >= 0:
        pair = w.pairs[w.nodes[caller].row, place]
        write(pair, after_refusal(read(pair), now, retry_after_s, pair.sent, rng))
