"""Whose rules choose the next replica in the policy simulation: ours, SWARM's, or chance.

Ours are the functions that the pipeline calls (`routing`, `standing`), fed with what a caller would know.
SWARM's is its interleaved weighted round robin with moving averages, as notes of its source describe it:
pick the least T, then T += measured seconds; a new replica enters at the least T; an error bans it.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from shoal.node.simulate.fleet import Node, rtt_s
from shoal.training.pipeline.replicas import Replica
from shoal.training.pipeline.routing import Candidate, best, busy_for_s, sample
from shoal.training.pipeline.standing import Report, Standing


class Router(ABC):
    """One set of rules for all callers. `known` of a node is kept by `meet` and `part`."""

    def __init__(self, rng: random.Random, micro_batch_bytes: float) -> None:
        self._rng = rng
        self._bytes = micro_batch_bytes  # one way

    @abstractmethod
    def meet(self, caller: Node, replica: Node) -> None:
        """The caller hears of a replica."""

    def part(self, caller: Node, replica: Node) -> None:
        """It is gone."""
        caller.known.pop(replica, None)

    @abstractmethod
    def pick(self, caller: Node, now: float) -> Node | None:
        """Whom to ask now; None while nobody may be asked."""

    def again_s(self, caller: Node, now: float) -> float:
        """When there may be room, if nothing is answered before."""
        return math.inf

    def busy_s(self, replica: Node, now: float) -> float:
        """For how long a replica turns a caller away that has just come; 0: not at all."""
        return 0.0

    @abstractmethod
    def sent(self, caller: Node, replica: Node, now: float) -> None:
        """A micro-batch is on its way."""

    def passed(self, caller: Node, replica: Node) -> None:
        """It is through with a forward: its Working messages tell."""
        return

    @abstractmethod
    def answered(self, caller: Node, replica: Node, now: float, sent_s: float, own_s: float) -> None:
        """Its gradient came; `own_s`: what link and replica took, without the stages behind."""

    def failed(self, caller: Node, replica: Node, now: float, sent_s: float, died: bool) -> None:
        """No answer will come: it died, or a hop before it did."""
        return

    def turned_away(
        self, caller: Node, replica: Node, now: float, sent_s: float, retry_after_s: float
    ) -> None:
        """It was busy."""
        return


@dataclass(slots=True)
class _Known:
    replica: Replica  # as last heard
    standing: Standing = field(default_factory=Standing)
    sent_s: list[float] = field(default_factory=list)


class ShoalRouter(Router):
    """`training.pipeline`'s policies."""

    def meet(self, caller: Node, replica: Node) -> None:
        if replica not in caller.known:
            caller.known[replica] = _Known(Replica(replica.name, rtt_s(caller, replica)))

    def pick(self, caller: Node, now: float) -> Node | None:
        known: dict[Node, _Known] = caller.known
        roomy = [
            node
            for node, k in known.items()
            if len(k.sent_s) < (standing := k.standing).window and now >= standing.closed_until_s
        ]  # as `Standing.admits`, which takes twice as long to call
        if not roomy and not any(k.standing.established for k in known.values()):
            roomy = [n for n, k in known.items() if k.standing.admits(now, len(k.sent_s), all_new=True)]
        if len(roomy) <= 1:
            return roomy[0] if roomy else None
        services_s = [known[node].standing.service_s or node.service_s for node in roomy]
        drawn = [roomy[index] for index in sample(services_s, self._rng)]
        chosen = best([self._candidate(node, known[node], now) for node in drawn], round(2 * self._bytes))
        return next(node for node in drawn if chosen is not None and node.name == chosen.peer)

    @staticmethod
    def _candidate(node: Node, known: _Known, now: float) -> Candidate:
        heard_s, backlog_s = node.heard(now)
        if known.replica.heard_s != heard_s:
            known.replica = Replica(node.name, known.replica.rtt_s, backlog_s, node.service_s, heard_s)
        return known.standing.candidate(known.replica, known.sent_s, now, node.service_s)

    def again_s(self, caller: Node, now: float) -> float:
        closed = (known.standing.closed_until_s for known in caller.known.values())
        return min((until_s for until_s in closed if until_s > now), default=math.inf)

    def busy_s(self, replica: Node, now: float) -> float:
        queued = len(replica.forward) + len(replica.backward) + replica.weights
        return busy_for_s(queued, replica.backlog_s(now), replica.service_s)

    def sent(self, caller: Node, replica: Node, now: float) -> None:
        caller.known[replica].sent_s.append(now)

    def passed(self, caller: Node, replica: Node) -> None:
        known: _Known | None = caller.known.get(replica)
        if known is not None:
            known.standing = known.standing.passed(len(known.sent_s))

    def answered(self, caller: Node, replica: Node, now: float, sent_s: float, own_s: float) -> None:
        known: _Known | None = caller.known.get(replica)
        if known is not None:
            known.sent_s.remove(sent_s)
            one, other = caller.machine, replica.machine
            per_byte = 0.5 / min(one.upload_bytes_per_s, other.download_bytes_per_s)
            per_byte += 0.5 / min(other.upload_bytes_per_s, one.download_bytes_per_s)
            report = Report(replica.service_s, replica.backlog_s(now), per_byte)
            known.standing = known.standing.answered(now, report)

    def failed(self, caller: Node, replica: Node, now: float, sent_s: float, died: bool) -> None:
        known: _Known | None = caller.known.get(replica)
        if known is not None:
            known.sent_s.remove(sent_s)
            if died:
                known.standing = known.standing.failed(now, self._rng)

    def turned_away(
        self, caller: Node, replica: Node, now: float, sent_s: float, retry_after_s: float
    ) -> None:
        known: _Known | None = caller.known.get(replica)
        if known is not None:
            known.sent_s.remove(sent_s)
            known.standing = known.standing.busy(now, retry_after_s, len(known.sent_s), self._rng)


@dataclass(slots=True)
class _Turn:
    due: float  # SWARM's T
    seconds: float = 1.0  # a micro-batch, until measured


class SwarmRouter(Router):
    """SWARM's wiring: no queue of the server and no other caller is seen, nobody is ever turned away."""

    _SMOOTHING = 0.1

    def meet(self, caller: Node, replica: Node) -> None:
        if replica not in caller.known:
            caller.known[replica] = _Turn(min((turn.due for turn in caller.known.values()), default=0.0))

    def pick(self, caller: Node, now: float) -> Node | None:
        if not caller.known:
            return None
        chosen = min(caller.known, key=lambda node: caller.known[node].due)
        turn: _Turn = caller.known[chosen]
        turn.due += turn.seconds
        return chosen

    def sent(self, caller: Node, replica: Node, now: float) -> None:
        return

    def answered(self, caller: Node, replica: Node, now: float, sent_s: float, own_s: float) -> None:
        turn: _Turn | None = caller.known.get(replica)
        if turn is not None:
            turn.seconds += self._SMOOTHING * (own_s - turn.seconds)


class RandomRouter(Router):
    """Anybody who is there."""

    def meet(self, caller: Node, replica: Node) -> None:
        caller.known[replica] = None

    def pick(self, caller: Node, now: float) -> Node | None:
        return self._rng.choice(list(caller.known)) if caller.known else None

    def sent(self, caller: Node, replica: Node, now: float) -> None:
        return

    def answered(self, caller: Node, replica: Node, now: float, sent_s: float, own_s: float) -> None:
        return
