"""How long training stands still for a checkpoint: written beside it, against written on the compute lane.

    python tests/benchmarks/checkpoint_pause.py [--template small] [--device cpu] [--repeats 5] [--json]

One replica holds the whole model and always has two pieces of training in its lane's queue. `pause_s` is the
time in which the lane trained nothing from the beginning of a checkpoint to its end, the turns between two
pieces included. That hashing and writing take CPU time from training where both run on the same cores is not
in it. With --json the last line holds the medians and `pause_share`, whose goal is 0.02.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.protocol.identity import PeerId, Role
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.training.checkpoint.keeper import Keeper
from shoal.training.checkpoint.read import Checkpoint
from shoal.training.lane import ThreadLane
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.outer.parts import cut
from shoal.training.outer.snapshot import genesis_snapshot
from shoal.training.pipeline.compute import Passage, StageCompute
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES
from shoal.training.weights import Weights
from shoal.training.work import Work

PLAIN_S = 2.0  # of training without a checkpoint, before and after each


@dataclass(frozen=True)
class Span:
    """A piece of work on the lane."""

    begun_s: float
    ended_s: float
    trains: bool


class NotedLane(ThreadLane):
    """A lane that notes what it spends its time on."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        super().__init__()

    async def run(
        self, kind: Work, function: Callable[..., Any], *arguments: Any, since: float | None = None
    ) -> Any:
        return await super().run(kind, self._noted, function, arguments, since=since)

    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        super().post(self._noted, function, arguments)

    def _noted(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        begun_s = time.perf_counter()
        result = function(*arguments)
        self.spans.append(Span(begun_s, time.perf_counter(), function.__name__ == "train"))
        return result


class Trainee:
    """One replica of the whole model that trains on random tokens for as long as it is let."""

    def __init__(self, spec: RunSpec, device: str, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.spec, self.device, self.pool = spec, device, pool
        self.layout = stage_layout(spec, range(spec.model.layers))
        self.lane = NotedLane()
        self.initial = genesis(spec, self.layout)
        self.weights = Weights(spec, self.layout, self.initial, self.lane, device)
        model = StageModel(spec, self.layout)
        self.compute = StageCompute(spec, model, self.weights, device, lambda: 1e-4)
        outer, block = spec.outer, spec.compression.block
        fragments = cut(self.layout.size, outer.part_bytes, block, outer.fragments)
        self.agreed = genesis_snapshot(spec.run_id(), 0, self.initial, fragments)
        me = PeerId("bench")
        self.keeper = Keeper(
            spec,
            0,
            self.layout,
            transport=MemoryNetwork(1).transport(me, frozenset({Role.TRAINER})),
            folder=folder,
            snapshot=self._snapshot,
            moments=lambda: self.weights.moments(self.offload),
            offload=self.offload,
            event=lambda kind, data: None,
        )

    async def offload(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *arguments)

    async def _snapshot(self) -> Any:
        return self.agreed

    def train(self) -> None:
        shape = (self.spec.inner.micro_batch_sequences, self.spec.model.sequence + 1)
        passage = Passage(torch.randint(0, 256, shape).to(self.device), None)
        self.compute.forward(passage)
        self.compute.backward(passage, None, "", "")
        self.compute.add(passage)
        if self.device != "cpu":
            torch.cuda.synchronize()

    async def train_on(self) -> None:
        """Two at a time, so that the lane never waits."""

        async def one() -> None:
            while True:
                await self.lane.run(Work.FORWARD, self.train)

        await asyncio.gather(one(), one())

    async def beside(self) -> Checkpoint:
        """As a peer does it."""
        self.keeper._newest = None  # the same head again
        return await self.keeper.take()

    async def blocking(self) -> Checkpoint:
        """All of it on the lane, as a training loop that saves does it."""

        def save() -> Any:
            async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
                return function(*arguments)

            async def moments() -> Any:
                return self.weights._optimizer.moments()

            keeper = self.keeper
            kept = keeper._offload, keeper._moments
            keeper._offload, keeper._moments, keeper._newest = inline, moments, None
            try:
                return asyncio.run(keeper._write(self.agreed))
            finally:
                keeper._offload, keeper._moments = kept

        return await self.lane.run(Work.UPDATE, save)  # type: ignore[no-any-return]


async def measure(trainee: Trainee, save: Callable[[], Any]) -> dict[str, float]:
    """One checkpoint in the midst of training."""
    lane = trainee.lane
    lane.spans.clear()
    await asyncio.sleep(PLAIN_S)
    begun_s = time.perf_counter()
    await save()
    ended_s = time.perf_counter()
    await asyncio.sleep(PLAIN_S)
    training = [span for span in lane.spans if span.trains]
    gaps = [
        after.begun_s - before.ended_s
        for before, after in itertools.pairwise(training)
        if after.begun_s >= begun_s and before.ended_s <= ended_s
    ]
    return {"save_s": ended_s - begun_s, "pause_s": sum(gaps)}


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    values = TEMPLATES[arguments.template].model_dump()
    values["stages"]["count"] = 1
    values["checkpoint"]["kept"] = 1
    values["inner"]["micro_batch_sequences"] = 1  # many pieces of work in the time that a checkpoint takes
    spec = RunSpec.model_validate(values)
    with ThreadPoolExecutor(2) as pool, tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        trainee = Trainee(spec, arguments.device, Path(folder), pool)
        training = asyncio.create_task(trainee.train_on())
        while trainee.weights.inner_steps < 1 and not training.done():
            await asyncio.sleep(0.2)
        rows: dict[str, list[dict[str, float]]] = {"beside": [], "blocking": []}
        for _ in range(arguments.repeats):
            for name in rows:
                rows[name].append(await measure(trainee, getattr(trainee, name)))
        training.cancel()
        await asyncio.gather(training, return_exceptions=True)
        await trainee.lane.close()
    medians = {
        f"{name}_{key}": statistics.median(row[key] for row in found)
        for name, found in rows.items()
        for key in found[0]
    }
    share = medians["beside_pause_s"] / medians["blocking_pause_s"]
    parameters = trainee.layout.size
    return {"parameters": parameters, "device": arguments.device, **medians, "pause_share": share,
            "load": os.getloadavg()[0]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--template", default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", default=None, help="where to write")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = asyncio.run(run(arguments))
    if arguments.json:
        print(json.dumps(found))
        return
    for key, value in found.items():
        print(f"{key:20} {value:.6g}" if isinstance(value, float) else f"{key:20} {value}")


if __name__ == "__main__":
    main()
