"""What a simulation found: samples over time, and totals. Both modes fill it; report and JSON read it."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.node.simulate.ideal import ideal_work
from shoal.node.simulate.options import Options

SAMPLES = 240  # over the whole time
Progress = Callable[[float, float], None]  # virtual seconds done, of all


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the swarm."""

    at_s: float
    rate: float  # micro-batches a second decided since the last one
    ideal: float  # of the peers alive that had time to download
    capacity: tuple[float, ...]  # of each stage, by the peers that serve it

    @property
    def bottleneck(self) -> int:
        """The stage that sets the pace."""
        return min(range(len(self.capacity)), key=self.capacity.__getitem__)


@dataclass
class Life:
    """One peer's stay. Times in virtual seconds."""

    speed: float
    ready_s: float  # when it can have downloaded a stage
    gone_s: float = float("inf")


@dataclass
class Outcome:
    """Everything that is reported."""

    options: Options
    stages: int
    micro_batch_tokens: int
    stage_s: tuple[float, ...] = ()  # lane time of a micro-batch at each stage at speed 1
    samples: list[Sample] = field(default_factory=list)
    lives: list[Life] = field(default_factory=list)
    micro_batches: int = 0  # decided within the measured time
    joins: int = 0  # after the first ones
    failed_joins: int = 0
    kills: int = 0
    leaves: int = 0
    moves: int = 0
    reroutes: list[tuple[float, float]] = field(default_factory=list)  # (when, seconds)
    retries: int = 0
    adopted: int = 0  # of their micro-batches, where what stood behind was taken over (full protocol)
    hedges: int = 0
    adopted_streams: int = 0  # data streams that a driver went on with (full protocol)
    forks: int = 0  # times that a peer met another chain of its stage (full protocol)
    lost: int = 0  # decided, but missing at a hop that is gone, or whose driver is
    unexplained: int = 0  # decided, not applied, and both are there
    duplicated: int = 0  # applied twice at one stage
    broken: list[str] = field(default_factory=list)  # promises P1 to P5 (full protocol)
    rounds: list[int] = field(default_factory=list)  # the highest log of each stage
    setbacks: list[tuple[float, int, int]] = field(default_factory=list)
    """(when, stage, rounds of the run by then): nobody was left who knew them."""
    begun: float = 0.0  # work, in seconds at speed 1 within the measured time (policies only) ...
    drained: float = 0.0  # ... of it by those who were leaving
    thrown: float = 0.0  # ... and done in vain
    bytes_by_use: dict[str, float] = field(default_factory=dict)
    directory_bytes: float = 0.0
    trace: str = ""
    wall_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def measured(self) -> list[Sample]:
        """The samples after the warm-up."""
        return [sample for sample in self.samples if sample.at_s > self.options.warmup_s]

    @property
    def ideal_micro_batches(self) -> float:
        """Of the linear programme over the peers alive, downloads charged."""
        options = self.options
        lives = [(life.speed, life.ready_s, life.gone_s) for life in self.lives]
        return ideal_work(lives, options.warmup_s, options.end_s) / sum(self.stage_s)

    @property
    def peer_seconds(self) -> float:
        """Of all peers, from when they had time to download."""
        end_s = self.options.end_s
        return max(sum(min(life.gone_s, end_s) - life.ready_s for life in self.lives), 1e-9)

    @property
    def throughput_of_ideal(self) -> float:
        ideal = self.ideal_micro_batches
        return self.micro_batches / ideal if ideal > 0 else 0.0

    @property
    def throughput_of_placement(self) -> float:
        """Against what the slowest stage allowed, as the peers were placed: what routing made of it."""
        allowed = statistics.fmean(min(sample.capacity) for sample in self.measured) if self.measured else 0.0
        return self.micro_batches / (allowed * self.options.duration_s) if allowed > 0 else 0.0

    @property
    def stage_balance(self) -> float:
        """Capacity of the slowest stage to the mean of all, over time."""
        shares = [
            min(sample.capacity) / statistics.fmean(sample.capacity)
            for sample in self.measured
            if any(sample.capacity)
        ]
        return statistics.fmean(shares) if shares else 0.0

    def lanes(self) -> dict[str, float]:
        """Where the time of the lanes went that the ideal counts, in shares of it; they add up to 1.

        `absent`: of who is alive and serves nothing yet, or not any more. `uneven`: what the other stages had
        more than the slowest. `waiting`: for work, besides. `thrown`: done in vain. `under_way`: more begun
        than decided, less what those did who drained.
        """
        ideal, over_s = self.ideal_micro_batches * sum(self.stage_s), self.options.duration_s
        if not self.measured or ideal <= 0 or self.begun == 0:
            return {}
        capacity = [(self._work(sample.capacity), min(sample.capacity)) for sample in self.measured]
        serving = statistics.fmean(all_ for all_, _ in capacity) * over_s
        even = statistics.fmean(least for _, least in capacity) * sum(self.stage_s) * over_s
        busy = self.begun - self.drained
        useful = self.micro_batches * sum(self.stage_s)
        shares = {
            "useful": useful,
            "absent": ideal - serving,
            "uneven": serving - even,
            "waiting": even - busy,
            "thrown": self.thrown,
            "under_way": busy - useful - self.thrown,
        }
        return {name: round(share / ideal, 4) for name, share in shares.items()}

    def _work(self, capacity: Sequence[float]) -> float:
        return sum(rate * cost for rate, cost in zip(capacity, self.stage_s, strict=True))

    def bottlenecks(self) -> dict[int, float]:
        """Share of the time in which each stage set the pace."""
        counts = Counter(sample.bottleneck for sample in self.measured)
        return {stage: counts[stage] / len(self.measured) for stage in sorted(counts)}

    def to_json(self) -> dict[str, object]:
        """The summary: stable keys, times in seconds."""
        options = self.options
        seconds = [took_s for _, took_s in self.reroutes]
        return {
            "mode": options.mode,
            "router": options.router,
            "recovery": options.recovery,
            "peers": options.peers,
            "stages_most": options.stages_most,
            "stages": self.stages,
            "hours": options.duration_s / 3600,
            "warmup_s": options.warmup_s,
            "session_s": options.session_s,
            "speed_spread": options.speed_spread,
            "micro_batch_s": options.micro_batch_s,
            "seed": options.seed,
            "throughput_of_ideal": round(self.throughput_of_ideal, 4),
            "throughput_of_placement": round(self.throughput_of_placement, 4),
            "stage_balance": round(self.stage_balance, 4),
            "lanes": self.lanes(),
            "micro_batches": self.micro_batches,
            "tokens_per_s": round(self.micro_batches * self.micro_batch_tokens / options.duration_s, 1),
            "bottlenecks": self.bottlenecks(),
            "joins": self.joins,
            "failed_joins": self.failed_joins,
            "kills": self.kills,
            "leaves": self.leaves,
            "moves": self.moves,
            "retries": self.retries,
            "adopted": self.adopted,
            "hedges": self.hedges,
            "adopted_streams": self.adopted_streams,
            "forks": self.forks,
            "reroutes": len(seconds),
            "reroute_p50_s": round(_quantile(seconds, 0.5), 3),
            "reroute_p95_s": round(_quantile(seconds, 0.95), 3),
            "reroute_max_s": round(max(seconds, default=0.0), 3),
            "lost": self.lost,
            "unexplained": self.unexplained,
            "duplicated": self.duplicated,
            "broken": self.broken,
            "rounds": self.rounds,
            "setbacks": len(self.setbacks),
            "bytes": {use: round(count) for use, count in sorted(self.bytes_by_use.items())},
            "directory_bytes_per_peer_s": round(self.directory_bytes / self.peer_seconds, 1),
            "trace": self.trace,
            "wall_s": round(self.wall_s, 2),
            "cpu_s": round(self.cpu_s, 2),
            "virtual_s_per_cpu_s": round(options.end_s / max(self.cpu_s, 1e-9), 2),
            "peak_rss_bytes": peak_rss_bytes(),
        }


class Stopwatch:
    """Wall and CPU time of a simulation, written into its outcome at the end."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def __enter__(self) -> None:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def __exit__(self, *exc: object) -> None:
        self._outcome.wall_s = time.perf_counter() - self._wall_s
        self._outcome.cpu_s = time.process_time() - self._cpu_s


def peak_rss_bytes() -> int:
    """The most memory this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
