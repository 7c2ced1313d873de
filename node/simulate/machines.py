"""The machines of a simulated swarm: speed, link and length of stay of each, drawn by seed and number.

A machine depends on nothing else, so that every router and planner meets the same ones. Links as volunteers
have them: 20 to 100 Mbit/s up, five times as much down, round trips around 80 ms.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

MBIT_BYTES = 125_000.0
UPLOAD_BYTES_PER_S = (20 * MBIT_BYTES, 100 * MBIT_BYTES)
DOWNLOAD_TIMES = 5.0
LATENCY_S = 0.02  # median, from a machine to the middle of the network: round trips of 80 ms
LATENCY_SIGMA = 0.69  # of its logarithm: 5 % of the round trips take over 250 ms


@dataclass(frozen=True, slots=True)
class Machine:
    """One volunteer's computer."""

    number: int
    speed: float  # service times are divided by it; 1 / speed has the mean 1
    latency_s: float  # one way, to the middle of the network
    upload_bytes_per_s: float
    download_bytes_per_s: float
    session_s: float  # from its start until it goes
    killed: bool  # it goes without a word

    def service_s(self, micro_batch_s: float, cost: float) -> float:
        """Lane time of a micro-batch at a stage of this cost (mean of the stages: 1)."""
        return micro_batch_s * cost / self.speed


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """What machines are drawn from."""

    seed: int
    speed_spread: float  # the fastest to the slowest; log-uniform between them
    session_s: float  # mean; exponential, as of peers that come and go independently
    kill_share: float  # of those who go

    def machine(self, number: int) -> Machine:
        """The machine of this number, the same whenever it is asked for."""
        rng = random.Random(f"{self.seed}/{number}")
        half = math.log(self.speed_spread) / 2
        mean = math.sinh(half) / half if half > 0 else 1.0  # of exp(x), x uniform in +-half
        upload = math.exp(rng.uniform(*map(math.log, UPLOAD_BYTES_PER_S)))
        return Machine(
            number=number,
            speed=math.exp(rng.uniform(-half, half)) * mean,
            latency_s=LATENCY_S * math.exp(rng.gauss(0.0, LATENCY_SIGMA)),
            upload_bytes_per_s=upload,
            download_bytes_per_s=DOWNLOAD_TIMES * upload,
            session_s=rng.expovariate(1.0 / self.session_s),
            killed=rng.random() < self.kill_share,
        )
