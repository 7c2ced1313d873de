"""The peers of the policy simulation, as plain state: a machine with a place in the swarm.

No messages and no clocks of their own: `flow` moves micro-batches through them. What changes with each of
these stands in `tables`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal.node.simulate.machines import Machine
from shoal.protocol.identity import PeerId
from shoal.training.rebalance import Placed


@dataclass(slots=True, eq=False, repr=False)  # they refer to one another
class Node:
    """One peer."""

    number: int
    name: PeerId
    machine: Machine
    stage: int = 0
    service_s: float = 1.0  # lane time of a micro-batch at its stage
    state: str = "joining"  # as in `dht.directory`; "gone" at the end
    index: int = -1  # in `tables`, once it serves
    known: dict[Node, None] = field(default_factory=dict)  # of the next stage
    placed: Placed | None = None  # a node serves one stage in its life: a mover comes back as another

    def as_placed(self) -> Placed:
        """How planners see it."""
        if self.placed is None:
            self.placed = Placed(self.name, self.stage, self.service_s)
        return self.placed
