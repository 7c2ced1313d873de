"""Micro-batches through chains of peers, as discrete events: the pipeline's rules without its messages.

A hop forwards, asks the next stage, runs its backward with what comes back, and computes its weight gradient
once the driver has decided. When a hop dies its direct caller asks another one; what the hops behind it did
is void, or adopted (`options.Recovery`). Not in here: frozen peers and hedges, rounds, lost frames, limits of
a sender's whole uplink.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

from shoal.node.simulate.fleet import Leg, Node, Trip, transfer_s
from shoal.node.simulate.options import Recovery
from shoal.node.simulate.routers import Router
from shoal.training.lane import WEIGHTS_WAITING

SERVING = ("online", "draining")
_NOTICE_S = 0.05  # until a broken stream is noticed


class Flow:
    """The event queue, and everything that happens to micro-batches. `at` takes others' events, too."""

    def __init__(
        self,
        router: Router,
        stages: int,
        *,
        in_flight: int,
        held_most: int,
        forward_bytes: float,
        backward_bytes: float,
        recovery: Recovery,
    ) -> None:
        self.router = router
        self.now = 0.0
        self.decided = 0
        self.lost = 0  # decided; a hop had died between its answer and that
        self.retries = 0
        self.reroutes: list[tuple[float, float]] = []
        self._last = stages - 1
        self._in_flight = in_flight
        self._held_most = held_most
        self._forward_bytes = forward_bytes
        self._backward_bytes = backward_bytes
        self._adopts = recovery == "adopt"
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = itertools.count()

    def at(self, when_s: float, call: Callable[..., None], *arguments: object) -> None:
        """Call it then."""
        heapq.heappush(self._events, (when_s, next(self._order), call, arguments))

    def run(self, until_s: float) -> None:
        """Everything that happens until then."""
        events, pop = self._events, heapq.heappop
        while events and events[0][0] <= until_s:
            self.now, _, call, arguments = pop(events)
            call(*arguments)
        self.now = until_s

    # --- peers

    def drive(self, driver: Node) -> None:
        """A first-stage replica is online: from now on it keeps `in_flight` micro-batches under way."""
        for _ in range(self._in_flight):
            self._begin(driver)

    def met(self, caller: Node, replica: Node) -> None:
        """A caller hears of a replica of its next stage."""
        self.router.meet(caller, replica)
        self._look_again(caller)

    def die(self, node: Node) -> None:
        """It is no more (its state says so); its callers ask others."""
        for trip in list(node.trips):
            if node.stage == 0:
                for leg in trip.legs:
                    self._void(trip, leg)
                continue
            self._replace(trip, node.stage)
        node.forward.clear()
        node.backward.clear()
        node.waiting.clear()
        node.weights = 0

    def _replace(self, trip: Trip, index: int) -> None:
        """The hop at `index` is dead: another one is to take its place."""
        legs = trip.legs
        self._void(trip, legs[index])
        if not self._adopts:
            for leg in legs[index + 1 :]:
                self._void(trip, leg)
        _trim(legs)
        self.retries += 1
        trip.broken_s.setdefault(index, self.now)
        self.at(self.now + _NOTICE_S, self._seek, trip, index)

    def _void(self, trip: Trip, leg: Leg) -> None:
        if leg.void:
            return
        leg.void = True
        leg.node.trips.pop(trip, None)
        if leg.caller is not None and not leg.answered:
            died = leg.node.state not in SERVING
            self.router.failed(leg.caller, leg.node, self.now, leg.sent_s, died)

    # --- a micro-batch, forward

    def _begin(self, driver: Node) -> None:
        if driver.state == "online":
            leg = Leg(driver, None, self.now)
            trip = Trip([leg])
            driver.trips[trip] = None
            driver.forward.append((trip, leg))
            self._work(driver)

    def _forwarded(self, node: Node, trip: Trip, leg: Leg) -> None:
        if not leg.void:
            leg.forwarded, leg.forwarded_s = True, self.now
            if leg.caller is not None:
                self.router.passed(leg.caller, node)
                self._look_again(leg.caller)
            if node.stage == self._last:
                node.backward.append((trip, leg))
            elif self._wants(trip, leg):
                self._ask(trip, leg)
            elif leg.returned:  # from a hop that the one before left behind
                node.backward.append((trip, leg))
        self._idle(node)

    @staticmethod
    def _wants(trip: Trip, leg: Leg) -> bool:
        """Whether this hop has something to send on, and nobody behind it has it already."""
        behind = leg.node.stage + 1
        taken = len(trip.legs) > behind and not trip.legs[behind].void
        return leg.forwarded and not leg.void and not taken

    def _seek(self, trip: Trip, index: int) -> None:
        """Find a replica for stage `index`, if the hop before is there and through with its forward."""
        if len(trip.legs) >= index:
            self._ask(trip, trip.legs[index - 1])

    def _ask(self, trip: Trip, leg: Leg) -> None:
        """Send it to the next stage, or wait for room there."""
        if not self._wants(trip, leg):
            return
        caller = leg.node
        replica = None if caller.waiting else self.router.pick(caller, self.now)
        if replica is None:
            caller.waiting.append((trip, leg))
            self._wake_later(caller)
        else:
            self._send(trip, leg, replica)

    def _send(self, trip: Trip, leg: Leg, replica: Node) -> None:
        caller, sent = leg.node, Leg(replica, leg.node, self.now)
        if len(trip.legs) == replica.stage:
            trip.legs.append(sent)
        else:
            trip.legs[replica.stage] = sent
        if len(trip.legs) > replica.stage + 1:
            behind = trip.legs[replica.stage + 1]
            sent.returned = not behind.void and behind.answered
            if behind.answered and behind.node.state not in SERVING:
                behind.void, sent.returned = True, False  # its gradient is gone with it
        replica.trips[trip] = None
        self.router.sent(caller, replica, self.now)
        arrives_s = self.now + transfer_s(caller, replica, self._forward_bytes)
        self.at(arrives_s, self._arrive, replica, trip, sent)

    def _arrive(self, node: Node, trip: Trip, leg: Leg) -> None:
        if leg.void:
            return
        busy_s = self.router.busy_s(node, self.now)
        if busy_s > 0.0 or node.state != "online" or len(node.trips) > self._held_most:
            leg.void = True
            del node.trips[trip]
            _trim(trip.legs)
            back_s = self.now + transfer_s(node, leg.caller or node, 0.0)
            self.at(back_s, self._turned_away, trip, leg, busy_s or node.service_s / 2)
            return
        node.forward.append((trip, leg))
        self._work(node)

    def _turned_away(self, trip: Trip, leg: Leg, retry_after_s: float) -> None:
        if leg.caller is not None:
            self.router.turned_away(leg.caller, leg.node, self.now, leg.sent_s, retry_after_s)
        self._seek(trip, leg.node.stage)

    # --- and back

    def _answered(self, node: Node, trip: Trip, leg: Leg) -> None:
        """The input gradient is computed: it goes to the caller."""
        if not leg.void:
            del node.trips[trip]
            caller = trip.legs[node.stage - 1].node
            arrives_s = self.now + transfer_s(node, caller, self._backward_bytes)
            self.at(arrives_s, self._returned, trip, leg)
        self._idle(node)

    def _returned(self, trip: Trip, answered: Leg) -> None:
        """The gradient of the stages behind is where it is needed next."""
        if answered.void:
            return
        leg = trip.legs[answered.node.stage - 1]
        answered.answered = True
        if answered.caller is not None:
            behind_s = answered.returned_s - answered.forwarded_s
            own_s = self.now - answered.sent_s - behind_s
            self.router.answered(answered.caller, answered.node, self.now, answered.sent_s, own_s)
        if (since_s := trip.broken_s.pop(answered.node.stage, None)) is not None:
            self.reroutes.append((self.now, self.now - since_s))
        if not leg.void:
            leg.returned, leg.returned_s = True, self.now
            if leg.forwarded:
                leg.node.backward.append((trip, leg))
                self._work(leg.node)
            self._look_again(leg.node)

    def _decided(self, driver: Node, trip: Trip, leg: Leg) -> None:
        """The driver is through: everybody computes weight gradients."""
        if not leg.void:
            del driver.trips[trip]
            self.decided += 1
            for hop in trip.legs:
                if hop.node.state in SERVING:
                    hop.node.weights += 1
                    self._work(hop.node)
                else:
                    self.lost += 1
            self._begin(driver)
        self._idle(driver)

    # --- lanes

    def _work(self, node: Node) -> None:
        """Give an idle lane its next piece, in the order of `lane.next_kind`."""
        if node.busy:
            return
        backward, forward = node.backward, node.forward
        while backward and backward[0][1].void:
            backward.popleft()
        while forward and forward[0][1].void:
            forward.popleft()
        done_s = self.now + node.piece_s
        if backward:
            call = self._answered if node.stage else self._decided
            self.at(done_s, call, node, *backward.popleft())
        elif forward and node.weights < WEIGHTS_WAITING:
            self.at(done_s, self._forwarded, node, *forward.popleft())
        elif node.weights:
            node.weights -= 1
            self.at(done_s, self._idle, node)
        else:
            return
        node.busy, node.free_s = True, done_s

    def _idle(self, node: Node) -> None:
        """The piece is done."""
        node.busy = False
        self._work(node)

    # --- waiting for room

    def _look_again(self, caller: Node) -> None:
        while caller.waiting:
            trip, leg = caller.waiting[0]
            if self._wants(trip, leg):
                replica = self.router.pick(caller, self.now)
                if replica is None:
                    self._wake_later(caller)
                    return
                self._send(trip, leg, replica)
            caller.waiting.popleft()

    def _wake_later(self, caller: Node) -> None:
        again_s = self.router.again_s(caller, self.now)
        if again_s < math.inf and not self.now < caller.wake_s <= again_s:
            caller.wake_s = again_s
            self.at(again_s, self._woken, caller, again_s)

    def _woken(self, caller: Node, wake_s: float) -> None:
        if caller.state != "gone" and caller.wake_s == wake_s:
            caller.wake_s = 0.0
            self._look_again(caller)


def _trim(legs: list[Leg]) -> None:
    """A chain ends with a hop that has something to do."""
    while legs[-1].void:
        legs.pop()
