"""The state of the policy simulation as arrays, and what is done to it blindly: heap, queues, free places.

A *leg* is what one hop has of a micro-batch, a *trip* the micro-batch. Legs are counted by who refers to
them (chain, events, queues), trips by their legs; whoever is not referred to any more is used again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

ONLINE, DRAINING, GONE = 1, 2, 3  # states of a node
FORWARD, BACKWARD, WAITING, HELD = 0, 1, 2, 3  # queues of a node: its lane's, for room behind, not answered
ARRIVED, FORWARDED, ANSWERED, RETURNED, REFUSED, SEEK, IDLE, WOKEN = range(8)  # kinds of events
DECIDED, LOST, RETRIES, REROUTED, EVENTS, FREE_LEGS, FREE_TRIPS = range(7)  # of `counts`
KNOWN_MOST, SENT_MOST = 32, 64  # replicas that a caller knows, and of its micro-batches under way at each
SPARE = 8192  # places that one event may take
_KIND_SHIFT = 40

NODE = np.dtype(
    [
        ("stage", "i8"),
        ("state", "i8"),
        ("busy", "i8"),  # pieces of its micro-batch that are left with the one that runs; 0: idle
        ("row", "i8"),  # of `known`, `pairs` and `sent`; -1: none
        ("known", "i8"),  # how many
        ("weights", "i8"),  # gradients to be computed
        ("service_s", "f8"),  # lane time of a micro-batch
        ("latency_s", "f8"),
        ("upload", "f8"),  # bytes/s
        ("download", "f8"),
        ("free_s", "f8"),  # when the piece that runs is done
        ("wake_s", "f8"),  # when it looks for room again, if that lies ahead
        ("beat_s", "f8"),
        ("beat_backlog_s", "f8"),
    ]
)
LEG = np.dtype(
    [
        ("trip", "i8"),
        ("node", "i8"),
        ("caller", "i8"),  # who sent it here; -1: it drives
        ("uses", "i8"),
        ("pieces", "i8"),  # of work, done
        ("sent_s", "f8"),
        ("forwarded_s", "f8"),
        ("returned_s", "f8"),  # when it had the gradient of the stages behind
        ("retry_s", "f8"),
        ("void", "i1"),  # dead, or of no use any more
        ("forwarded", "i1"),
        ("returned", "i1"),
        ("answered", "i1"),  # its own gradient reached the stage before
        ("held", "i1"),  # in its node's queue of those not answered
        ("waits", "i1"),  # in its node's queue for room behind
    ]
)
PAIR = np.dtype(
    [  # a replica in the eyes of a caller: `standing.Standing`, and what SWARM's rule remembers instead
        ("measured", "i8"),
        ("service_s", "f8"),
        ("seconds_per_byte", "f8"),
        ("backlog_s", "f8"),
        ("reported_s", "f8"),
        ("failures", "i8"),
        ("closed_until_s", "f8"),
        ("window", "i8"),
        ("crowded", "i1"),
        ("rtt_s", "f8"),
        ("sent", "i8"),  # micro-batches under way
        ("due", "f8"),
        ("seconds", "f8"),
    ]
)


class Rules(NamedTuple):
    """What does not change."""

    last: int  # stage
    in_flight: int
    held_most: int
    weights_waiting: int
    forward_bytes: float
    backward_bytes: float
    hop_bytes: float  # hidden states of a micro-batch, one way
    adopts: bool
    router: int


class Tables(NamedTuple):
    """The arrays; they grow between two calls, never within."""

    nodes: Any  # [node] NODE
    queues: Any  # [node, 4, 3]: first leg, last leg, length
    legs: Any  # [leg] LEG
    links: Any  # [leg, 4]: next in a lane's queue, next waiting, next held, the one before
    chain: Any  # [trip, stage]: leg
    length: Any  # [trip] of the chain: it grows forward, and stays on the way back
    uses: Any  # [trip]
    broken_s: Any  # [trip, stage] since when it wants another replica; -1: it does not
    known: Any  # [row, KNOWN_MOST] nodes of the next stage
    pairs: Any  # [row, KNOWN_MOST] PAIR
    sent: Any  # [row, KNOWN_MOST, SENT_MOST] when
    when_s: Any  # [event] of the heap
    what: Any  # [event] kind and number
    free_legs: Any
    free_trips: Any
    counts: Any
    reroutes: Any  # [n, 2] (when, seconds)
    pieces: Any  # [stage, 3] of work: begun, of these by who drains, and thrown away


class World:
    """All of it, as the functions take it. `compiled` makes a compiled twin of this class."""

    def __init__(self, rules: Rules, tables: Tables) -> None:
        self.rules = rules
        self.nodes = tables.nodes
        self.queues = tables.queues
        self.legs = tables.legs
        self.links = tables.links
        self.chain = tables.chain
        self.length = tables.length
        self.uses = tables.uses
        self.broken_s = tables.broken_s
        self.known = tables.known
        self.pairs = tables.pairs
        self.sent = tables.sent
        self.when_s = tables.when_s
        self.what = tables.what
        self.free_legs = tables.free_legs
        self.free_trips = tables.free_trips
        self.counts = tables.counts
        self.reroutes = tables.reroutes
        self.pieces = tables.pieces


def empty_tables(size: int, stages: int) -> Tables:
    """With so many places of each kind, all free."""
    counts = np.zeros(8, np.int64)
    counts[FREE_LEGS] = counts[FREE_TRIPS] = size
    return Tables(
        nodes=np.zeros(size, NODE),
        queues=np.zeros((size, 4, 3), np.int64),
        legs=np.zeros(size, LEG),
        links=np.zeros((size, 4), np.int64),
        chain=np.zeros((size, stages), np.int64),
        length=np.zeros(size, np.int64),
        uses=np.zeros(size, np.int64),
        broken_s=np.zeros((size, stages)),
        known=np.zeros((size, KNOWN_MOST), np.int64),
        pairs=np.zeros((size, KNOWN_MOST), PAIR),
        sent=np.zeros((size, KNOWN_MOST, SENT_MOST)),
        when_s=np.zeros(size),
        what=np.zeros(size, np.int64),
        free_legs=np.arange(size)[::-1].copy(),
        free_trips=np.arange(size)[::-1].copy(),
        counts=counts,
        reroutes=np.zeros((2 * size, 2)),
        pieces=np.zeros((stages, 3), np.int64),
    )


def has_room(w: World | Tables) -> bool:
    """Whether another event may be handled."""
    n = w.counts
    return bool(
        n[FREE_LEGS] > SPARE
        and n[FREE_TRIPS] > SPARE
        and n[EVENTS] + SPARE < w.when_s.shape[0]
        and n[REROUTED] + SPARE < w.reroutes.shape[0]
    )


# --- events: a binary heap; of equal times whichever the heap brings, which is the same in every run


def push(w: World, when_s: float, kind: int, number: int) -> None:
    """An event to come."""
    times, what = w.when_s, w.what
    at = w.counts[EVENTS]
    w.counts[EVENTS] = at + 1
    while at > 0:
        above = (at - 1) >> 1
        if times[above] <= when_s:
            break
        times[at], what[at] = times[above], what[above]
        at = above
    times[at], what[at] = when_s, (kind << _KIND_SHIFT) | number


def pop(w: World) -> tuple[int, int]:
    """Kind and number of the next event; its time is `when_s[0]` before."""
    times, what = w.when_s, w.what
    found = what[0]
    size = w.counts[EVENTS] - 1
    w.counts[EVENTS] = size
    last_s, last = times[size], what[size]
    at = 0
    while True:
        below = 2 * at + 1
        if below >= size:
            break
        if below + 1 < size and times[below + 1] < times[below]:
            below += 1
        if times[below] >= last_s:
            break
        times[at], what[at] = times[below], what[below]
        at = below
    times[at], what[at] = last_s, last
    return found >> _KIND_SHIFT, found & ((1 << _KIND_SHIFT) - 1)


# --- legs and trips


def new_trip(w: World) -> int:
    w.counts[FREE_TRIPS] -= 1
    trip = w.free_trips[w.counts[FREE_TRIPS]]
    w.length[trip] = 0
    w.uses[trip] = 0
    w.broken_s[trip, :] = -1.0
    return int(trip)


def new_leg(w: World, trip: int, node: int, caller: int, now: float) -> int:
    """Referred to by nobody yet."""
    w.counts[FREE_LEGS] -= 1
    number = w.free_legs[w.counts[FREE_LEGS]]
    leg = w.legs[number]
    leg.trip, leg.node, leg.caller, leg.uses, leg.pieces, leg.sent_s = trip, node, caller, 0, 0, now
    leg.void = leg.forwarded = leg.returned = leg.answered = leg.held = leg.waits = 0
    leg.forwarded_s = leg.returned_s = leg.retry_s = 0.0
    w.uses[trip] += 1
    return int(number)


def drop(w: World, number: int) -> None:
    """One fewer refers to this leg."""
    leg = w.legs[number]
    leg.uses -= 1
    if leg.uses == 0:
        w.free_legs[w.counts[FREE_LEGS]] = number
        w.counts[FREE_LEGS] += 1
        drop_trip(w, leg.trip)


def drop_trip(w: World, trip: int) -> None:
    """One fewer refers to this trip."""
    w.uses[trip] -= 1
    if w.uses[trip] == 0:
        w.free_trips[w.counts[FREE_TRIPS]] = trip
        w.counts[FREE_TRIPS] += 1


def expect(w: World, when_s: float, kind: int, leg: int) -> None:
    """An event of this leg."""
    w.legs[leg].uses += 1
    push(w, when_s, kind, leg)


# --- queues of legs


def append(w: World, node: int, queue: int, leg: int) -> None:
    q, links = w.queues[node, queue], w.links
    link = max(queue - 1, 0)
    links[leg, link] = -1
    if q[2] == 0:
        q[0] = leg
    else:
        links[q[1], link] = leg
    if queue == HELD:
        links[leg, 3] = q[1] if q[2] else -1
        w.legs[leg].held = 1
    q[1] = leg
    q[2] += 1
    w.legs[leg].uses += 1


def take(w: World, node: int, queue: int) -> int:
    """The first; whoever takes it drops it."""
    q = w.queues[node, queue]
    leg = q[0]
    q[0] = w.links[leg, max(queue - 1, 0)]
    q[2] -= 1
    return int(leg)


def let_go(w: World, number: int) -> None:
    """It is not held by its node any more, if it was."""
    leg = w.legs[number]
    if leg.held == 0:
        return
    leg.held = 0
    q, after, before = w.queues[leg.node, HELD], w.links[number, 2], w.links[number, 3]
    q[2] -= 1
    if before >= 0:
        w.links[before, 2] = after
    else:
        q[0] = after
    if after >= 0:
        w.links[after, 3] = before
    else:
        q[1] = before
    drop(w, number)


def empty(w: World, node: int, queue: int) -> None:
    while w.queues[node, queue, 2] > 0:
        drop(w, take(w, node, queue))
