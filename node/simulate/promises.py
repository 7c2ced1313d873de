"""P1 to P5, watched from outside while a simulated swarm runs: what no peer sees, and none may break.

`swarm` shows it every living peer every few seconds, and each peer once more at its end. What is broken
is told in words; a simulation that breaks nothing says so in its outcome. (P2 is counted by `account`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.node.simulate.peer import SimulatedPeer
from shoal.protocol.identity import PeerId
from shoal.training.outer.service import Outer

BLIND_S = 15.0  # P3: after so long nobody waits for an answer of the dead
STILL_S = (
    60.0  # P5: so long may pass between two decisions while each stage has a replica: a join, and a chain
)
Process = tuple[str, int]  # peer and incarnation


@dataclass
class Promises:
    """See the module. `broken`: each breach once."""

    stages: int
    chain_s: float  # of an undisturbed micro-batch
    broken: list[str] = field(default_factory=list)
    checks: int = 0
    _roots: dict[tuple[int, bytes], bytes] = field(default_factory=dict)
    _dead_s: dict[PeerId, float] = field(default_factory=dict)
    _decided: int = 0
    _since_s: float = 0.0  # the last decision, or the last time that a stage was empty

    def died(self, now: float, peer: PeerId) -> None:
        """Without a word."""
        self._dead_s[peer] = now

    def look(self, now: float, serving: Mapping[PeerId, SimulatedPeer], decided: int) -> None:
        """At everybody who holds a stage."""
        self.checks += 1
        for name, peer in serving.items():
            self._same_head_same_state(name, peer)
            self._nobody_waits_for_the_dead(now, name, peer)
        held = {stage for peer in serving.values() if peer.online for stage in peer.replicas}
        if decided > self._decided or len(held) < self.stages:
            self._decided, self._since_s = decided, now
        elif now - self._since_s > STILL_S + self.chain_s:
            self._break(f"P5: nothing was decided since {self._since_s:.0f} s, though no stage was empty")
            self._since_s = now

    def close(self, name: PeerId, outer: Outer, incarnation: int, inner_steps: int) -> None:
        """P4: a peer's log is complete where it is kept, and its own steps are all in there or to come."""
        ends: dict[tuple[Process, int], int] = {}
        for height in range(1, outer.height + 1):
            entry = outer.entry(height)
            if entry is None:
                ends.clear()  # older than what it keeps
                continue
            for row in entry.contributors:
                seat = entry.roster[row.seat]
                key = (seat.peer, seat.incarnation), entry.fragment
                if ends.get(key, row.from_step) != row.from_step:
                    self._break(
                        f"P4: stage {entry.stage}, height {height}: steps {row.from_step}-{row.to_step} of "
                        f"{seat.peer} follow {ends[key]}"
                    )
                ends[key] = row.to_step
        mine = [step for (process, _), step in ends.items() if process == (name, incarnation)]
        if mine and max(mine) > inner_steps:
            self._break(f"P4: the log holds {max(mine)} steps of {name}, which made {inner_steps}")

    def _same_head_same_state(self, name: PeerId, peer: SimulatedPeer) -> None:
        for stage, trainer in peer.replicas.items():
            outer = trainer.outer
            known = self._roots.setdefault((stage, outer.head), outer.state_root)
            if known != outer.state_root:
                self._break(f"P1: {name} has another state than others at height {outer.height} of {stage}")

    def _nobody_waits_for_the_dead(self, now: float, name: PeerId, peer: SimulatedPeer) -> None:
        for trainer in peer.replicas.values():
            for asked, under_way in trainer.station.under_way().items():
                dead_for_s = now - self._dead_s.get(asked, now)
                if under_way and dead_for_s > BLIND_S:
                    self._break(f"P3: {name} still waits for {asked}, dead for {dead_for_s:.0f} s")

    def _break(self, what: str) -> None:
        if what not in self.broken:
            self.broken.append(what)
