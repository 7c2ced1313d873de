"""What does training lose when inference takes all that it may?

    python tests/benchmarks/inference_share.py [--share 0.125] [--pace 0.24] [--seconds 12] [--json]

Real processes (`shoal up`, `shoal join`: mutual TLS, DHT, rounds), one replica of each of two stages, on the
paced lane: a micro-batch takes a declared time of it, a batch of inference a sixteenth of that, both above
what they cost the CPU; so training has the lane busy all the time, and the machine matters little. In turns
nobody asks, and the sessions of a client write without a pause.

`fall`: by how much the rate of micro-batches with inference lies below that without, all turns of a kind
together. `inference_share`: what inference took of the busier lane in its turns; near `--share` it was at its
limit. The goal: fall at most share + 0.05, with at least four fifths of the share taken; exit status 1 if
missed, 2 where the processes used more than nine tenths of the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from paced_peers import START_S, join, quiet_peer, token_of, training_of

from shoal.node import AsyncClient, Options
from shoal.node.demo.processes import JsonObject, PeerProcess
from shoal.training import spec_text
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES

MARGIN, TAKEN_GOAL, CPU_MOST = 0.05, 0.8, 0.9
STAGES = 2


@dataclass(frozen=True, slots=True)
class Look:
    """What one peer said."""

    at_s: float
    micro_batches: int
    served_s: float  # of its lane
    tokens: int  # positions computed for sessions
    cpu_s: float


def shared_spec() -> RunSpec:
    """The tiny template, with enough in flight that no lane waits."""
    values = TEMPLATES["tiny"].model_dump()
    values["run"]["name"] = "share"
    values["model"]["sequence"] = 256
    values["stages"]["count"] = STAGES
    values["inner"] |= {"micro_batch_sequences": 1, "in_flight": 8, "inner_tokens": 2048}
    values["checkpoint"]["every_s"] = 0.0
    return RunSpec.model_validate(values)


class Swarm:
    """One peer a stage, and the client."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        self.peers = [quiet_peer(f"s{stage}", folder / f"s{stage}") for stage in range(STAGES)]

    async def start(self) -> str:
        """The client's token."""
        spec = self._folder / "run.toml"
        spec.write_text(spec_text.render(shared_spec()))
        share = ("--inference-share", str(self._options.share), "--pace", str(self._options.pace))
        owner, other = self.peers
        await owner.start("up", str(spec), "--listen", "127.0.0.1", "--stage", "0", *share)
        await owner.event("invitation", START_S)
        await join(owner, other, "--stage", "1", *share)
        await asyncio.gather(*(peer.event("online", START_S) for peer in self.peers))
        return await token_of(owner, "client", "inference")

    async def look(self) -> list[Look]:
        return [await _look(peer) for peer in self.peers]

    async def stop(self) -> None:
        await asyncio.gather(*(peer.stop() for peer in self.peers))


async def _look(peer: PeerProcess) -> Look:
    training, cpu_s = await training_of(peer)
    return Look(
        time.perf_counter(),
        int(training["micro_batches"]),
        float(training["lane_served_s"]),
        int(training["sessions"]["positions"]),
        cpu_s,
    )


@contextlib.asynccontextmanager
async def writing(client: AsyncClient, sessions: int) -> AsyncIterator[None]:
    """So many texts are being written all the time."""

    async def one(number: int) -> None:
        prompt = f"def number_{number}("
        options = Options(max_new_tokens=220, temperature=0.9, seed=number)
        while True:
            await client.generate(prompt, options)

    tasks = [asyncio.create_task(one(number)) for number in range(sessions)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for failed in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(failed, asyncio.CancelledError):
                raise SystemExit(f"a text was not written: {failed}")


@dataclass(slots=True)
class Turns:
    """All of a kind, added up by peer."""

    seconds: float = 0.0
    micro_batches: int = 0
    tokens: int = 0
    cpu_s: float = 0.0
    served_s: tuple[float, ...] = (0.0,) * STAGES

    def add(self, before: list[Look], after: list[Look]) -> None:
        self.seconds += after[0].at_s - before[0].at_s
        self.micro_batches += after[-1].micro_batches - before[-1].micro_batches
        self.tokens += after[-1].tokens - before[-1].tokens
        self.cpu_s += sum(b.cpu_s - a.cpu_s for a, b in zip(before, after, strict=True))
        pairs = zip(self.served_s, before, after, strict=True)
        self.served_s = tuple(sum_s + b.served_s - a.served_s for sum_s, a, b in pairs)


async def measure(folder: Path, options: argparse.Namespace) -> JsonObject:
    swarm = Swarm(folder, options)
    alone, beside = Turns(), Turns()
    begun_s = time.process_time()
    try:
        token = await swarm.start()
        async with AsyncClient(token, data_dir=folder / "client") as client:
            await asyncio.sleep(options.warm_up)
            for _ in range(options.pairs):
                before = await swarm.look()
                await asyncio.sleep(options.seconds)
                alone.add(before, await swarm.look())
                async with writing(client, options.sessions):
                    await asyncio.sleep(options.settle)
                    before = await swarm.look()
                    await asyncio.sleep(options.seconds)
                    beside.add(before, await swarm.look())
                await asyncio.sleep(options.settle)
    finally:
        await swarm.stop()
    rates = [turns.micro_batches / turns.seconds for turns in (alone, beside)]
    cpu_s = alone.cpu_s + beside.cpu_s + time.process_time() - begun_s
    return {
        "share": options.share,
        "inference_share": round(max(beside.served_s) / beside.seconds, 4),
        "fall": round(1.0 - rates[1] / rates[0], 4),
        "micro_batches_per_s": [round(rate, 2) for rate in rates],
        "allowed_per_s": round(1.0 / options.pace, 2),
        "inference_tokens_per_s": round(beside.tokens / beside.seconds, 1),
        "cpu_share": round(cpu_s / (alone.seconds + beside.seconds) / (os.cpu_count() or 1), 3),
        "load_average": round(os.getloadavg()[0], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--share", type=float, default=0.125)
    parser.add_argument(
        "--pace", type=float, default=0.24, help="seconds of the lane that a micro-batch takes"
    )
    parser.add_argument("--sessions", type=int, default=48, help="so many that they fill their share")
    parser.add_argument("--warm-up", type=float, default=8.0)
    parser.add_argument("--settle", type=float, default=2.0, help="seconds between two turns")
    parser.add_argument("--seconds", type=float, default=12.0, help="of a turn")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="shoal-share-"))
    try:
        found = asyncio.run(measure(folder, options))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found, indent=None if options.json else 2))
    if found["cpu_share"] > CPU_MOST:
        return 2
    missed = found["fall"] > options.share + MARGIN or found["inference_share"] < TAKEN_GOAL * options.share
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
