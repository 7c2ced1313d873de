"""Micro-batches through chains of peers: what happens at each event of the policy simulation, compiled.

A hop forwards, asks the next stage, runs its backward with what comes back, and computes its weight gradient
once the driver has decided. When a hop dies its direct caller asks another one; what the hops behind it did
is adopted, or void (`options.Recovery`). `flow` calls `run` and everything else that takes no underscore.
"""

from __future__ import annotations

import math
from typing import Any

from shoal.node.simulate import choice
from shoal.node.simulate.tables import (
    ANSWERED,
    ARRIVED,
    BACKWARD,
    DECIDED,
    DRAINING,
    FORWARD,
    FORWARDED,
    GONE,
    HELD,
    IDLE,
    LOST,
    ONLINE,
    REFUSED,
    REROUTED,
    RETRIES,
    RETURNED,
    SEEK,
    WAITING,
    WOKEN,
    World,
    append,
    drop,
    drop_trip,
    empty,
    expect,
    has_room,
    let_go,
    new_leg,
    new_trip,
    pop,
    push,
    take,
)

_NOTICE_S = 0.05  # until a broken stream is noticed
PIECES = (
    3  # of a micro-batch at a lane: forward, input gradient, weight gradient, a third each (`lane.paced`)
)
_BEGUN, _DRAINED, _THROWN = 0, 1, 2  # columns of `pieces`


def run(w: World, rng: Any, until_s: float) -> bool:
    """Everything that happens until then; False: the arrays have to grow before the rest can."""
    while w.counts[4] > 0 and w.when_s[0] <= until_s:
        if not has_room(w):
            return False
        now = w.when_s[0]
        kind, number = pop(w)
        if kind == SEEK:
            stages = w.chain.shape[1]
            _seek(w, rng, number // stages, number % stages, now)
            drop_trip(w, number // stages)
        elif kind == IDLE:
            _idle(w, number, now)
        elif kind == WOKEN:
            if w.nodes[number].state != GONE and w.nodes[number].wake_s == now:
                w.nodes[number].wake_s = 0.0
                look_again(w, rng, number, now)
        else:
            _of_leg(w, rng, kind, number, now)
            drop(w, number)
    return True


def _of_leg(w: World, rng: Any, kind: int, number: int, now: float) -> None:
    if kind == ARRIVED:
        _arrived(w, number, now)
    elif kind == FORWARDED:
        _forwarded(w, rng, number, now)
    elif kind == ANSWERED:
        if w.nodes[w.legs[number].node].stage == 0:
            _decided(w, number, now)
        else:
            _answered(w, number, now)
    elif kind == RETURNED:
        _returned(w, rng, number, now)
    elif kind == REFUSED:
        leg = w.legs[number]
        choice.turned_away(w, rng, leg.caller, leg.node, now, leg.sent_s, leg.retry_s)
        _seek(w, rng, leg.trip, w.nodes[leg.node].stage, now)


# --- peers


def drive(w: World, driver: int, now: float) -> None:
    """A first-stage replica is online: from now on it keeps `in_flight` micro-batches under way."""
    for _ in range(w.rules.in_flight):
        _begin(w, driver, now)


def introduce(w: World, rng: Any, callers: Any, replicas: Any, begin: int, now: float) -> int:
    """Each caller from `begin` on hears of a replica of its next stage, and sends what waited for one.

    Returns where it ended: at the last, or where the arrays have to grow first.
    """
    for index in range(begin, len(callers)):
        if not has_room(w):
            return index
        if choice.meet(w, callers[index], replicas[index]):
            look_again(w, rng, callers[index], now)
    return len(callers)


def part(w: World, callers: Any, replica: int) -> None:
    """The callers hear that a replica takes no more work."""
    for index in range(len(callers)):
        choice.part(w, callers[index], replica)


def die(w: World, rng: Any, node: int, now: float) -> None:
    """It is no more (its state says so); its callers ask others."""
    stage = w.nodes[node].stage
    while w.queues[node, HELD, 2] > 0:
        number = w.queues[node, HELD, 0]
        trip = w.legs[number].trip
        if stage == 0:
            for index in range(w.length[trip]):
                _void(w, rng, w.chain[trip, index], now)
            _close(w, trip)
        else:
            _replace(w, rng, number, now)
    for queue in (FORWARD, BACKWARD, WAITING):
        empty(w, node, queue)
    w.nodes[node].weights = 0


def _replace(w: World, rng: Any, number: int, now: float) -> None:
    """This hop is dead: another one is to take its place."""
    trip, stage = w.legs[number].trip, w.nodes[w.legs[number].node].stage
    w.uses[trip] += 1
    _void(w, rng, number, now)
    if not w.rules.adopts:
        for index in range(stage + 1, w.length[trip]):
            _void(w, rng, w.chain[trip, index], now)
    _trim(w, trip)
    w.counts[RETRIES] += 1
    if w.broken_s[trip, stage] < 0:
        w.broken_s[trip, stage] = now
    push(w, now + _NOTICE_S, SEEK, trip * w.chain.shape[1] + stage)


def _void(w: World, rng: Any, number: int, now: float) -> None:
    leg = w.legs[number]
    if leg.void:
        return
    leg.void = 1
    w.pieces[w.nodes[leg.node].stage, _THROWN] += leg.pieces
    let_go(w, number)
    if leg.caller >= 0 and not leg.answered:
        choice.failed(w, rng, leg.caller, leg.node, now, leg.sent_s, w.nodes[leg.node].state == GONE)


def _trim(w: World, trip: int) -> None:
    """A chain ends with a hop that has something to do."""
    while w.length[trip] > 0:
        last = w.chain[trip, w.length[trip] - 1]
        if not w.legs[last].void:
            break
        w.length[trip] -= 1
        drop(w, last)


def _close(w: World, trip: int) -> None:
    """Nobody asks for its chain any more."""
    count = w.length[trip]
    w.length[trip] = 0
    for index in range(count):
        drop(w, w.chain[trip, index])


# --- a micro-batch, forward


def _begin(w: World, driver: int, now: float) -> None:
    if w.nodes[driver].state == ONLINE:
        trip = new_trip(w)
        leg = new_leg(w, trip, driver, -1, now)
        w.chain[trip, 0], w.length[trip] = leg, 1
        w.legs[leg].uses += 1
        append(w, driver, HELD, leg)
        append(w, driver, FORWARD, leg)
        _work(w, driver, now)


def _forwarded(w: World, rng: Any, number: int, now: float) -> None:
    leg = w.legs[number]
    node = leg.node
    _count(w, number)
    if not leg.void:
        leg.forwarded, leg.forwarded_s = 1, now
        if leg.caller >= 0:
            choice.passed(w, leg.caller, node)
            look_again(w, rng, leg.caller, now)
        if w.nodes[node].stage == w.rules.last:
            append(w, node, BACKWARD, number)
        elif _wants(w, number):
            _ask(w, rng, number, now)
        elif leg.returned:  # from a hop that the one before left behind
            append(w, node, BACKWARD, number)
    _idle(w, node, now)


def _count(w: World, number: int) -> None:
    """Of a piece of work that is done."""
    leg = w.legs[number]
    leg.pieces += 1
    if leg.void:
        w.pieces[w.nodes[leg.node].stage, _THROWN] += 1


def _wants(w: World, number: int) -> bool:
    """Whether this hop has something to send on, and nobody behind it has it already."""
    leg = w.legs[number]
    if leg.void or not leg.forwarded:
        return False
    behind = w.nodes[leg.node].stage + 1
    return bool(w.length[leg.trip] <= behind or w.legs[w.chain[leg.trip, behind]].void)


def _seek(w: World, rng: Any, trip: int, stage: int, now: float) -> None:
    """Find a replica for this stage, if the hop before is there and through with its forward."""
    if w.length[trip] >= stage:
        _ask(w, rng, w.chain[trip, stage - 1], now)


def _ask(w: World, rng: Any, number: int, now: float) -> None:
    """Send it to the next stage, or wait for room there, once: two events may ask for it."""
    if not _wants(w, number) or w.legs[number].waits:
        return
    caller = w.legs[number].node
    place = -1 if w.queues[caller, WAITING, 2] > 0 else choice.pick(w, rng, caller, now)
    if place < 0:
        append(w, caller, WAITING, number)
        w.legs[number].waits = 1
        _wake_later(w, caller, now)
    else:
        _send(w, number, place, now)


def _send(w: World, number: int, place: int, now: float) -> None:
    caller, trip = w.legs[number].node, w.legs[number].trip
    replica = w.known[w.nodes[caller].row, place]
    stage = w.nodes[replica].stage
    new = new_leg(w, trip, replica, caller, now)
    w.legs[new].uses += 1
    if w.length[trip] == stage:
        w.length[trip] += 1
    else:
        drop(w, w.chain[trip, stage])
    w.chain[trip, stage] = new
    if w.length[trip] > stage + 1:
        behind = w.legs[w.chain[trip, stage + 1]]
        w.legs[new].returned = 1 if behind.answered and not behind.void else 0
        if behind.answered and not behind.void and w.nodes[behind.node].state == GONE:
            behind.void, w.legs[new].returned = 1, 0  # its gradient is gone with it
            w.pieces[stage + 1, _THROWN] += behind.pieces
    append(w, replica, HELD, new)
    choice.sent(w, caller, place, now)
    expect(w, now + _transfer_s(w, caller, replica, w.rules.forward_bytes), ARRIVED, new)


def _transfer_s(w: World, sender: int, receiver: int, payload_bytes: float) -> float:
    """Until so many bytes have crossed."""
    one, other = w.nodes[sender], w.nodes[receiver]
    return float(one.latency_s + other.latency_s + payload_bytes / min(one.upload, other.download))


def _arrived(w: World, number: int, now: float) -> None:
    leg = w.legs[number]
    if leg.void:
        return
    node = leg.node
    busy_s = choice.busy_s(w, node, now)
    if busy_s > 0.0 or w.nodes[node].state != ONLINE or w.queues[node, HELD, 2] > w.rules.held_most:
        leg.void = 1
        leg.retry_s = busy_s or w.nodes[node].service_s / 2
        let_go(w, number)
        _trim(w, leg.trip)
        expect(w, now + _transfer_s(w, node, leg.caller, 0.0), REFUSED, number)
        return
    append(w, node, FORWARD, number)
    _work(w, node, now)


# --- and back


def _answered(w: World, number: int, now: float) -> None:
    """The input gradient is computed: it goes to the caller."""
    leg = w.legs[number]
    _count(w, number)
    if not leg.void:
        let_go(w, number)
        caller = w.legs[w.chain[leg.trip, w.nodes[leg.node].stage - 1]].node
        expect(w, now + _transfer_s(w, leg.node, caller, w.rules.backward_bytes), RETURNED, number)
    _idle(w, leg.node, now)


def _returned(w: World, rng: Any, number: int, now: float) -> None:
    """The gradient of the stages behind is where it is needed next."""
    done = w.legs[number]
    if done.void:
        return
    stage = w.nodes[done.node].stage
    before = w.chain[done.trip, stage - 1]
    leg = w.legs[before]
    done.answered = 1
    own_s = now - done.sent_s - (done.returned_s - done.forwarded_s)
    choice.answered(w, done.caller, done.node, now, done.sent_s, own_s)
    since_s = w.broken_s[done.trip, stage]
    if since_s >= 0:
        w.broken_s[done.trip, stage] = -1.0
        w.reroutes[w.counts[REROUTED], 0], w.reroutes[w.counts[REROUTED], 1] = now, now - since_s
        w.counts[REROUTED] += 1
    if not leg.void:
        leg.returned, leg.returned_s = 1, now
        if leg.forwarded:
            append(w, leg.node, BACKWARD, before)
            _work(w, leg.node, now)
        look_again(w, rng, leg.node, now)


def _decided(w: World, number: int, now: float) -> None:
    """The driver is through: everybody computes weight gradients."""
    leg = w.legs[number]
    driver, trip = leg.node, leg.trip
    _count(w, number)
    if not leg.void:
        let_go(w, number)
        w.counts[DECIDED] += 1
        for index in range(w.length[trip]):
            hop = w.legs[w.chain[trip, index]].node
            if w.nodes[hop].state == GONE:
                w.counts[LOST] += 1
            else:
                w.nodes[hop].weights += 1
                _work(w, hop, now)
        _close(w, trip)
        _begin(w, driver, now)
    _idle(w, driver, now)


# --- lanes


def _work(w: World, node: int, now: float) -> None:
    """Give an idle lane its next piece, in the order of `work.next_kind`."""
    one = w.nodes[node]
    if one.busy:
        return
    for queue in (BACKWARD, FORWARD):
        while w.queues[node, queue, 2] > 0 and w.legs[w.queues[node, queue, 0]].void:
            drop(w, take(w, node, queue))
    done_s = now + one.service_s / PIECES
    if w.queues[node, BACKWARD, 2] > 0:
        push(w, done_s, ANSWERED, take(w, node, BACKWARD))  # the queue's reference is the event's now
        one.busy = 2
    elif w.queues[node, FORWARD, 2] > 0 and one.weights < w.rules.weights_waiting:
        push(w, done_s, FORWARDED, take(w, node, FORWARD))
        one.busy = PIECES
    elif one.weights > 0:
        one.weights -= 1
        push(w, done_s, IDLE, node)
        one.busy = 1
    else:
        return
    one.free_s = done_s
    w.pieces[one.stage, _BEGUN] += 1
    if one.state == DRAINING:
        w.pieces[one.stage, _DRAINED] += 1


def _idle(w: World, node: int, now: float) -> None:
    """The piece is done."""
    w.nodes[node].busy = 0
    _work(w, node, now)


# --- waiting for room


def look_again(w: World, rng: Any, caller: int, now: float) -> None:
    """Something may have become free."""
    while w.queues[caller, WAITING, 2] > 0:
        number = w.queues[caller, WAITING, 0]
        if _wants(w, number):
            place = choice.pick(w, rng, caller, now)
            if place < 0:
                _wake_later(w, caller, now)
                return
            _send(w, number, place, now)
        w.legs[number].waits = 0
        drop(w, take(w, caller, WAITING))


def _wake_later(w: World, caller: int, now: float) -> None:
    again_s = choice.again_s(w, caller, now)
    wake_s = w.nodes[caller].wake_s
    if again_s < math.inf and not now < wake_s <= again_s:
        w.nodes[caller].wake_s = again_s
        push(w, again_s, WOKEN, caller)
