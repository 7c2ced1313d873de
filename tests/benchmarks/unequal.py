"""Does each replica get work by its speed, and do all together do what they can?

    python tests/benchmarks/unequal.py [--stages 3] [--slower 4] [--fast 0.6] [--seconds 90] [--json]

Real processes (`shoal up`, `shoal join`: mutual TLS, DHT, heartbeats, rounds), at every stage one fast
replica and one `--slower` times slower, on the paced lane: a micro-batch takes a declared time of the lane,
above what it costs the CPU, so that the result depends on the machine only while all processes together use
at most half of its cores; a run that used more is not counted (exit status 2).

Each stage allows the sum of its replicas' measured speeds, 1 / lane time of a micro-batch. `rate_of_allowed`
is the swarm's rate over what the slowest stage allows, `share_error` by how much a replica's share of its
stage's micro-batches is off the share of its speed, the worst. Goals 0.9 and 0.15; exit status 1 if missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from paced_peers import START_S, join, quiet_peer, training_of

from shoal.node.demo.processes import JsonObject, PeerProcess
from shoal.training import spec_text
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES

RATE_GOAL, SHARE_GOAL, CPU_GOAL = 0.9, 0.15, 0.5


@dataclass(frozen=True, slots=True)
class Look:
    """What one peer said, and what it had used of the CPU."""

    at_s: float
    micro_batches: int
    service_s: float
    cpu_s: float


def unequal_spec(stages: int, in_flight: int) -> RunSpec:
    """The tiny template in more stages; rounds every few seconds."""
    values = TEMPLATES["tiny"].model_dump()
    values["run"]["name"] = "unequal"
    values["model"]["layers"] = max(values["model"]["layers"], stages)
    values["stages"]["count"] = stages
    values["inner"] |= {"micro_batch_sequences": 2, "in_flight": in_flight, "inner_tokens": 2048}
    values["outer"] |= {"inner_steps": 10}
    return RunSpec.model_validate(values)


class Unequal:
    """The swarm; peers by stage, the fast one first."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder = folder
        self._options = options
        self.peers: list[list[PeerProcess]] = []

    async def start(self) -> None:
        options = self._options
        spec = self._folder / "run.toml"
        spec.write_text(spec_text.render(unequal_spec(options.stages, options.in_flight)))
        paces = (options.fast, options.fast * options.slower)
        self.peers = [
            [quiet_peer(f"s{stage}-{word}", self._folder / f"{stage}-{word}") for word in SPEEDS]
            for stage in range(options.stages)
        ]
        owner = self.peers[0][0]
        await owner.start("up", str(spec), "--listen", "127.0.0.1", "--stage", "0", "--pace", str(paces[0]))
        await owner.event("invitation", START_S)
        for stage, group in enumerate(self.peers):
            for peer, pace_s in zip(group, paces, strict=True):
                if peer is not owner:
                    await join(owner, peer, "--stage", str(stage), "--pace", str(pace_s))
                    await peer.event("plan", START_S)  # one import of torch at a time
        await asyncio.gather(*(peer.event("online", START_S) for group in self.peers for peer in group))

    async def look(self) -> list[list[Look]]:
        return [[await _look(peer) for peer in group] for group in self.peers]

    async def stop(self) -> None:
        await asyncio.gather(*(peer.stop() for group in self.peers for peer in group))


SPEEDS = ("fast", "slow")


async def _look(peer: PeerProcess) -> Look:
    training, cpu_s = await training_of(peer)
    done, service_s = int(training["micro_batches"]), float(training["lane_service_s"])
    return Look(time.perf_counter(), done, service_s, cpu_s)


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One stage; lists have the fast replica first."""

    rate: float  # micro-batches a second
    allowed: float  # by the measured speeds
    service_s: list[float]
    shares: list[float]  # of the stage's micro-batches
    speed_shares: list[float]

    @classmethod
    def between(cls, before: list[Look], after: list[Look]) -> StageFigures:
        done = [b.micro_batches - a.micro_batches for a, b in zip(before, after, strict=True)]
        rates = [n / (b.at_s - a.at_s) for n, a, b in zip(done, before, after, strict=True)]
        speeds = [1.0 / look.service_s for look in after]
        return cls(
            rate=sum(rates),
            allowed=sum(speeds),
            service_s=[look.service_s for look in after],
            shares=[n / sum(done) for n in done],
            speed_shares=[speed / sum(speeds) for speed in speeds],
        )

    @property
    def share_error(self) -> float:
        pairs = zip(self.shares, self.speed_shares, strict=True)
        return max(abs(share - speed) / speed for share, speed in pairs)


def judge(before: list[list[Look]], after: list[list[Look]]) -> JsonObject:
    """The figures of a run."""
    stages = [StageFigures.between(a, b) for a, b in zip(before, after, strict=True)]
    looks = [
        (a, b) for first, last in zip(before, after, strict=True) for a, b in zip(first, last, strict=True)
    ]
    seconds = looks[0][1].at_s - looks[0][0].at_s
    return {
        "seconds": seconds,
        "stages": [asdict(stage) for stage in stages],
        "rate_of_allowed": min(stage.rate for stage in stages) / min(stage.allowed for stage in stages),
        "share_error": max(stage.share_error for stage in stages),
        "cpu_share": sum(b.cpu_s - a.cpu_s for a, b in looks) / seconds / (os.cpu_count() or 1),
    }


async def measure(folder: Path, options: argparse.Namespace) -> JsonObject:
    swarm = Unequal(folder, options)
    try:
        await swarm.start()
        await asyncio.sleep(options.warm_up)
        before = await swarm.look()
        await asyncio.sleep(options.seconds)
        return judge(before, await swarm.look())
    finally:
        await swarm.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--slower", type=float, default=4.0)
    parser.add_argument("--fast", type=float, default=0.6, help="seconds of a micro-batch at a fast replica")
    parser.add_argument("--in-flight", type=int, default=12)
    parser.add_argument("--warm-up", type=float, default=40.0)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="shoal-unequal-"))
    try:
        found = asyncio.run(measure(folder, options))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found, indent=None if options.json else 2))
    if found["cpu_share"] > CPU_GOAL:
        return 2
    return int(found["rate_of_allowed"] < RATE_GOAL or found["share_error"] > SHARE_GOAL)


if __name__ == "__main__":
    sys.exit(main())
