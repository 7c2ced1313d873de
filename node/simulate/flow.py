"""The event queue of the policy simulation: its own events, and those of micro-batches (`passage`).

Not in here: frozen peers and hedges, rounds, lost frames, limits of a sender's whole uplink.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from shoal.node.simulate import tables
from shoal.node.simulate.choice import BEAT_S
from shoal.node.simulate.compiled import PLAIN, Entrances
from shoal.node.simulate.fleet import Node
from shoal.node.simulate.tables import Rules, Tables

_FEWEST = 4 * tables.SPARE  # places of each kind, to begin with
_FREE = {
    tables.FREE_LEGS: ("free_legs", "legs", "links"),
    tables.FREE_TRIPS: ("free_trips", "chain", "length", "uses", "broken_s"),
}
_STATES = {"online": tables.ONLINE, "draining": tables.DRAINING, "gone": tables.GONE}


class Flow:
    """See the module. `at` takes others' events; nodes are known here from `serve` to `die`."""

    def __init__(self, rules: Rules, rng: np.random.Generator, entrances: Entrances = PLAIN) -> None:
        """`entrances`: `compiled()` where it is worth the time that compiling takes."""
        self.now = 0.0
        self._reroutes: list[tuple[float, float]] = []
        self._rng = rng
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = itertools.count()
        self._nodes = 0
        self._rows = list(range(_FEWEST))[::-1]
        self._rules = rules
        self._calls = entrances
        self._use(tables.empty_tables(_FEWEST, rules.last + 1))

    def _use(self, new: Tables) -> None:
        """`Tables` hold what `world` does: records where it is compiled, with attributes where not."""
        if self._calls is PLAIN:
            new = Tables(*(array.view(np.recarray) if array.dtype.names else array for array in new))
        self._tables = new
        self.world = self._calls.world(self._rules, new)

    @property
    def decided(self) -> int:
        return int(self._tables.counts[tables.DECIDED])

    @property
    def lost(self) -> int:
        """Decided; a hop had died between its answer and that."""
        return int(self._tables.counts[tables.LOST])

    @property
    def retries(self) -> int:
        return int(self._tables.counts[tables.RETRIES])

    @property
    def reroutes(self) -> list[tuple[float, float]]:
        """(when, seconds from a hop's death until another's gradient came)."""
        self._collect()
        return self._reroutes

    @property
    def pieces(self) -> Any:
        """By stage: pieces of work begun, of these by who drains, and thrown away."""
        return self._tables.pieces

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
        while not self._calls.run(self.world, self._rng, until_s):
            self._grow()
        self.now = until_s

    # --- peers

    def serve(self, node: Node) -> None:
        """It is online."""
        if self._nodes == len(self._tables.nodes):
            self._double("nodes", "queues")
        if not self._rows:
            size = len(self._tables.known)
            self._rows = list(range(size, 2 * size))[::-1]
            self._double("known", "pairs", "sent")
        node.index, self._nodes = self._nodes, self._nodes + 1
        place = self._tables.nodes[node.index]
        place["stage"], place["state"], place["row"] = node.stage, tables.ONLINE, self._rows.pop()
        place["service_s"], place["latency_s"] = node.service_s, node.machine.latency_s
        place["upload"], place["download"] = (
            node.machine.upload_bytes_per_s,
            node.machine.download_bytes_per_s,
        )
        place["beat_s"] = -BEAT_S

    def drive(self, driver: Node) -> None:
        """A first-stage replica is online: from now on it keeps `in_flight` micro-batches under way."""
        self._make_room()
        self._calls.drive(self.world, driver.index, self.now)

    def introduce(self, pairs: Sequence[tuple[Node, Node]]) -> None:
        """(caller, replica): each caller hears of a replica of its next stage."""
        done = 0
        while done < len(pairs):
            self._make_room()
            callers, replicas = (np.array([node.index for node in side]) for side in zip(*pairs, strict=True))
            done = self._calls.introduce(self.world, self._rng, callers, replicas, done, self.now)

    def withdraw(self, node: Node, callers: Sequence[Node]) -> None:
        """These callers hear that it takes no more work."""
        self._tables.nodes[node.index]["state"] = _STATES[node.state]
        self._calls.part(
            self.world, np.array([caller.index for caller in callers], dtype=np.int64), node.index
        )

    def die(self, node: Node) -> None:
        """It is no more; whoever called it asks others."""
        place = self._tables.nodes[node.index]
        place["state"] = tables.GONE
        self._make_room()
        self._calls.die(self.world, self._rng, node.index, self.now)
        place = self._tables.nodes[node.index]
        self._rows.append(int(place["row"]))
        place["row"], place["known"] = -1, 0

    def waiting(self, node: Node) -> int:
        """Pieces of work in its queue."""
        queues = self._tables.queues[node.index]
        return int(queues[tables.FORWARD, 2] + queues[tables.BACKWARD, 2]) + int(
            self._tables.nodes[node.index]["weights"]
        )

    def waiting_by_stage(self) -> Any:
        """The same, of everybody who is online, summed up."""
        nodes = self._tables.nodes
        online = np.flatnonzero(nodes["state"] == tables.ONLINE)
        queues = self._tables.queues[online]
        pieces = queues[:, tables.FORWARD, 2] + queues[:, tables.BACKWARD, 2] + nodes["weights"][online]
        return np.bincount(nodes["stage"][online], pieces, minlength=self._rules.last + 1)

    def holds(self, node: Node) -> int:
        """Micro-batches asked of it and not answered."""
        return int(self._tables.queues[node.index, tables.HELD, 2])

    # --- room

    def _make_room(self) -> None:
        while not tables.has_room(self._tables):
            self._grow()

    def _grow(self) -> None:
        """Twice as much of what gets narrow; the reroutes are taken away."""
        self._collect()
        arrays, n = self._tables, self._tables.counts
        if n[tables.EVENTS] + tables.SPARE >= len(arrays.when_s):
            self._double("when_s", "what")
        for free, names in _FREE.items():
            if n[free] <= tables.SPARE:
                size = len(getattr(arrays, names[0]))
                self._double(*names)
                getattr(self._tables, names[0])[n[free] : n[free] + size] = np.arange(size, 2 * size)
                n[free] += size

    def _double(self, *names: str) -> None:
        self._use(self._tables._replace(**{name: _twice(getattr(self._tables, name)) for name in names}))

    def _collect(self) -> None:
        """The reroutes told by now."""
        arrays, n = self._tables, self._tables.counts
        self._reroutes.extend(
            (when_s, took_s) for when_s, took_s in arrays.reroutes[: n[tables.REROUTED]].tolist()
        )
        n[tables.REROUTED] = 0


def _twice(array: Any) -> Any:
    """The same, and as many zeros."""
    made = np.zeros((2 * array.shape[0], *array.shape[1:]), array.dtype)
    made[: array.shape[0]] = array
    return made
