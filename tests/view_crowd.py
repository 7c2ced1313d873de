"""What many replicas tell a coordinator: a round a minute, reroutes, figures, at times a fault."""

from __future__ import annotations

import dataclasses
import random

from view_peers import round_told, training
from view_world import own, replica, swarm

from shoal.node.view.buffer import Buffer
from shoal.node.view.figures import figures_of
from shoal.node.view.messages import TelemetryBatch

ROUND_S = 60


class Crowd:
    """By name; `batch` is what one has to tell since the last time."""

    def __init__(self, count: int, stages: int, seed: int) -> None:
        print("seed", seed)
        self.names = [f"peer{number:03}" for number in range(count)]
        self.now = 0.0
        self._stages = stages
        self._rng = random.Random(seed)
        self._buffers = {name: Buffer(clock=lambda: self.now, capacity=16) for name in self.names}
        self._sent = dict.fromkeys(self.names, 0)
        self._view = swarm(*(replica(name, 0) for name in self.names[:8]), me="nobody")

    def stage(self, name: str) -> int:
        return self.names.index(name) % self._stages

    def happens(self, name: str, height: int) -> None:
        """The minute of one peer, up to the round at `height`."""
        rng, stage, buffer = self._rng, self.stage(name), self._buffers[name]
        buffer.add("round", round_told(height, stage, loss=rng.uniform(2.0, 3.0)))
        if rng.random() < 0.5:
            buffer.add("reroute", {"stage": stage, "to": "somebody", "seconds": rng.expovariate(1.0)})
        if rng.random() < 0.05:
            buffer.add("stage-found", {"stage": stage, "height": height})

    def batch(self, name: str, uptime_s: float) -> TelemetryBatch:
        report = training(
            stage=self.stage(name),
            tokens=int(uptime_s * 100),
            micro_batches=int(uptime_s),
            lane_busy_s=uptime_s * 0.7,
        )
        me = dataclasses.replace(own(name), uptime_s=uptime_s, training=report)
        events = self._buffers[name].after(self._sent[name])
        self._sent[name] = events[-1].number if events else self._sent[name]
        return TelemetryBatch(events, figures_of(me, self._view), 0)
