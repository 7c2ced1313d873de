"""What a simulation is asked for, and which kind of it does that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.dht.neighbours import SMALL_SWARM
from shoal.node.simulate.machines import Draws

FULL_PROTOCOL_PEERS = 200  # beyond, every beat and frame of everybody takes too long
Router = Literal["shoal", "swarm", "random"]
Recovery = Literal["redo", "adopt"]
"""Whoever takes a dead hop's place adopts those behind it and gets their gradient, as in the pipeline; or
what they did is void and done again (policies only), for comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One simulation."""

    peers: int
    duration_s: float  # measured
    warmup_s: float  # before: peers join, the pipeline fills
    seed: int
    session_s: float
    micro_batch_s: float  # lane time of a micro-batch: mean over machines and stages
    speed_spread: float = 8.0
    kill_share: float = 0.5
    policies_only: bool | None = None  # None: by the number of peers
    router: Router = "shoal"
    recovery: Recovery = "adopt"
    stages_most: int = 1  # that a peer holds at once (full protocol)
    neighbour_limit: int = SMALL_SWARM  # full protocol: heartbeat streams that a peer holds by its own wish

    @property
    def mode(self) -> str:
        """`full`: the real protocol; `policies`: routing, placement and rebalancing alone."""
        wanted = self.policies_only
        if wanted is None:
            wanted = self.peers > FULL_PROTOCOL_PEERS or self.router != "shoal" or self.recovery != "adopt"
        return "policies" if wanted else "full"

    @property
    def end_s(self) -> float:
        return self.warmup_s + self.duration_s

    def told(self) -> str:
        """Which kind of simulation it is, and why, for people."""
        why = "as asked" if self.policies_only is not None else f"{self.peers:,} peers"
        if self.mode == "full":
            return f"full protocol ({why}): every message of every peer"
        return f"policies only ({why}): routing, placement and rebalancing decide, no messages are exchanged"

    def draws(self) -> Draws:
        return Draws(
            seed=self.seed,
            speed_spread=self.speed_spread,
            session_s=self.session_s,
            kill_share=self.kill_share,
        )


def filled_s(stages: int, micro_batch_s: float) -> float:
    """By when peers have joined and the pipeline is full: queues make three of each service time."""
    return 10.0 + 3.0 * stages * micro_batch_s
