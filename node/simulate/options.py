"""What a simulation is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.node.simulate.machines import Draws


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

    @property
    def end_s(self) -> float:
        return self.warmup_s + self.duration_s

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
