"""The event queue of the policy simulation: its own events, few, and those of micro-batches, many (`passage`).

Not in here: frozen peers and hedges, rounds, lost frames, limits of a sender's whole uplink.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shoal.node.simulate import passage, tables
from shoal.node.simulate.choice import BEAT_S
from shoal.node.simulate.compiled import njit
from shoal.node.simulate.fleet import Node
from shoal.node.simulate.tables import World

_FEWEST = 4 * tables.SPARE  # places of each kind, to begin with
_STATES = {"online": tables.ONLINE, "draining": tables.DRAINING, "gone": tables.GONE}


class Flow:
    """See the module. `at` takes others' events; nodes are known here from `serve` to `die`."""

    def __init__(self, rules: tables.Rules, rng: np.random.Generator) -> None:
        self.now = 0.0
        self.reroutes: list[tuple[float, float]] = []
        self._rng = rng
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = itertools.count()
        self._nodes = 0
        self._rows = list(range(_FEWEST))[::-1]
        self._world = _world(rules)

    @property
    def decided(self) -> int:
        return int(self._world.counts[tables.DECIDED])

    @property
    def lost(self) -> int:
        """Decided; a hop had died between its answer and that."""
        return int(self._world.counts[tables.LOST])

    @property
    def retries(self) -> int:
        return int(self._world.counts[tables.RETRIES])

    @property
    def pieces(self) -> Any:
        """By stage: pieces of work begun, of these by who drains, and thrown away."""
        return self._world.pieces

    def at(self, when_s: float, call: Callable[..., None], *arguments: object) -> None:
        """Call it then."""
        heapq.heappush(self._events, (when_s, next(self._order), call, arguments))

    def run(self, until_s: float) -> None:
        """Everything that happens until then."""
        while self._events and self._events[0][0] <= until_s:
            when_s, _, call, arguments = heapq.heappop(self._events)
            self._pass(when_s)
            call(*arguments)
        self._pass(until_s)

    def _pass(self, until_s: float) -> None:
        while not passage.run(self._world, self._rng, until_s):
            self._grow()
        self.now = until_s

    # --- peers

    def serve(self, node: Node) -> None:
        """It is online."""
        if self._nodes == len(self._world.nodes):
            self._world = _more_nodes(self._world)
        if not self._rows:
            self._rows = list(range(len(self._world.known), 2 * len(self._world.known)))[::-1]
            self._world = _more_rows(self._world)
        node.index, self._nodes = self._nodes, self._nodes + 1
        place = self._world.nodes[node.index]
        place["stage"], place["state"], place["row"] = node.stage, tables.ONLINE, self._rows.pop()
        place["service_s"], place["latency_s"] = node.service_s, node.machine.latency_s
        place["upload"], place["download"] = node.machine.upload_bytes_per_s, node.machine.download_bytes_per_s
        place["beat_s"] = -BEAT_S

    def drive(self, driver: Node) -> None:
        """A first-stage replica is online: from now on it keeps `in_flight` micro-batches under way."""
        self._make_room()
        passage.drive(self._world, driver.index, self.now)

    def introduce(self, pairs: Sequence[tuple[Node, Node]]) -> None:
        """(caller, replica): each caller hears of a replica of its next stage."""
        if pairs:
            self._make_room()
            callers, replicas = (np.array([node.index for node in side]) for side in zip(*pairs, strict=True))
            passage.introduce(self._world, self._rng, callers, replicas, self.now)

    def withdraw(self, node: Node, callers: Sequence[Node]) -> None:
        """These callers hear that it takes no more work."""
        self._world.nodes[node.index]["state"] = _STATES[node.state]
        passage.part(self._world, np.array([caller.index for caller in callers], dtype=np.int64), node.index)

    def die(self, node: Node) -> None:
        """It is no more; whoever called it asks others."""
        place = self._world.nodes[node.index]
        place["state"] = tables.GONE
        self._make_room()
        passage.die(self._world, self._rng, node.index, self.now)
        place = self._world.nodes[node.index]
        self._rows.append(int(place["row"]))
        place["row"], place["known"] = -1, 0

    def waiting(self, node: Node) -> int:
        """Pieces of work in its queue."""
        queues = self._world.queues[node.index]
        return int(queues[tables.FORWARD, 2] + queues[tables.BACKWARD, 2]) + int(
            self._world.nodes[node.index]["weights"]
        )

    def holds(self, node: Node) -> int:
        """Micro-batches asked of it and not answered."""
        return int(self._world.queues[node.index, tables.HELD, 2])

    # --- room

    def _make_room(self) -> None:
        while not passage.has_room(self._world):
            self._grow()

    def _grow(self) -> None:
        """Everything that an event takes, twice as much where it gets narrow; reroutes are taken away."""
        w, n = self._world, self._world.counts
        told = w.reroutes[: n[tables.REROUTED]].tolist()
        self.reroutes.extend((when_s, took_s) for when_s, took_s in told)
        n[tables.REROUTED] = 0
        if n[tables.EVENTS] + tables.SPARE >= len(w.when_s):
            w = w._replace(when_s=_twice(w.when_s), what=_twice(w.what))
        if n[tables.FREE_LEGS] <= tables.SPARE:
            w = w._replace(
                legs=_twice(w.legs), links=_twice(w.links), free_legs=_more(w.free_legs, n, tables.FREE_LEGS)
            )
        if n[tables.FREE_TRIPS] <= tables.SPARE:
            names = ("chain", "length", "uses", "broken_s")
            w = w._replace(**{name: _twice(getattr(w, name)) for name in names})
            w = w._replace(free_trips=_more(w.free_trips, n, tables.FREE_TRIPS))
        self._world = w

    def take_reroutes(self) -> list[tuple[float, float]]:
        """All of them: (when, seconds)."""
        self._grow()
        return self.reroutes


def _world(rules: tables.Rules) -> World:
    stages, size = rules.last + 1, _FEWEST
    counts = np.zeros(8, np.int64)
    counts[tables.FREE_LEGS] = counts[tables.FREE_TRIPS] = size
    return World(
        rules=rules,
        nodes=_table(1024, tables.NODE),
        queues=np.zeros((1024, 4, 3), np.int64),
        legs=_table(size, tables.LEG),
        links=np.zeros((size, 4), np.int64),
        chain=np.zeros((size, stages), np.int64),
        length=np.zeros(size, np.int64),
        uses=np.zeros(size, np.int64),
        broken_s=np.zeros((size, stages)),
        known=np.zeros((size, tables.KNOWN_MOST), np.int64),
        pairs=_table((size, tables.KNOWN_MOST), tables.PAIR),
        sent=np.zeros((size, tables.KNOWN_MOST, tables.SENT_MOST)),
        when_s=np.zeros(size),
        what=np.zeros(size, np.int64),
        free_legs=np.arange(size)[::-1].copy(),
        free_trips=np.arange(size)[::-1].copy(),
        counts=counts,
        reroutes=np.zeros((2 * size, 2)),
        pieces=np.zeros((stages, 3), np.int64),
    )


def _table(shape: int | tuple[int, ...], kind: Any) -> Any:
    """Zeros; where nothing is compiled, with fields as attributes."""
    made = np.zeros(shape, kind)
    return made if njit is not None else made.view(np.recarray)


def _twice(array: Any) -> Any:
    """The same, and as many zeros."""
    made = np.zeros((2 * array.shape[0], *array.shape[1:]), array.dtype).view(type(array))
    made[: array.shape[0]] = array
    return made


def _more(free: Any, counts: Any, which: int) -> Any:
    """Twice as many places, the new ones free."""
    size = len(free)
    made = _twice(free)
    count = counts[which]
    made[count : count + size] = np.arange(size, 2 * size)
    counts[which] += size
    return made


def _more_nodes(w: World) -> World:
    return w._replace(nodes=_twice(w.nodes), queues=_twice(w.queues))


def _more_rows(w: World) -> World:
    return w._replace(known=_twice(w.known), pairs=_twice(w.pairs), sent=_twice(w.sent))
