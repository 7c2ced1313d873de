"""What all workers of the all-reduce benchmark share: inputs, the parent's commands, error against fp64.

Imports neither Shoal nor hivemind: hivemind's worker runs in an environment of its own. A worker is a process
that speaks JSON lines with `allreduce.py`: configuration in, `hello` out, everybody's hellos in; then for
each round `ready` out, the CLOCK_MONOTONIC instant of release in, the instant of the end out; `finish` in,
figures out.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

CHUNK = 1 << 20  # values made and compared at a time
DATA = ("gaussian", "one-sided", "heavy")
_SPIN_S = 0.005  # before the release: timers of event loops are not finer


class System(ABC):
    """One peer's all-reduce of one system. Everything but `reduce` is outside the measured time."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.rank: int = config["rank"]
        self.peers: int = config["peers"]
        self.codec: str = config["codec"]
        self.config = config

    @abstractmethod
    async def hello(self) -> object:
        """What the others have to know of this peer."""

    @abstractmethod
    async def meet(self, hellos: list[Any]) -> None:
        """Everybody's hello, in order of rank."""

    @abstractmethod
    async def prepare(self, values: torch.Tensor, sign: float) -> None:
        """Take `sign` times `values` [n] fp32 as the next round's input, in memory."""

    @abstractmethod
    async def reduce(self) -> tuple[float, dict[str, float]]:
        """One all-reduce: the instant when this peer holds the decoded mean in fp32, and its parts."""

    @abstractmethod
    def mean(self) -> torch.Tensor:
        """The mean [n] fp32 that the last `reduce` found."""

    @abstractmethod
    async def close(self) -> dict[str, float]:
        """End; further figures."""


def chunks(data: str, rank: int, count: int) -> Iterator[torch.Tensor]:
    """A peer's input [count] fp32 in chunks, the same wherever it is made."""
    generator = torch.Generator().manual_seed(1000 + rank)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        values = torch.randn(size, generator=generator)
        if data == "one-sided":  # all of one sign, narrow: what broke two other quantisers
            values.mul_(1e-3).sub_(0.1)
        elif data == "heavy":  # Student's t with three degrees of freedom
            values.div_(torch.randn((3, size), generator=generator).square_().sum(0).div_(3).sqrt_())
        yield values


def errors(data: str, peers: int, mean: torch.Tensor) -> dict[str, float]:
    """Of a mean [n] against the fp64 mean of all inputs: relative error, and bias in its standard deviations.

    relative_error = ‖found − exact‖ / ‖exact‖; bias_in_std = average(found − exact) / std(exact).
    """
    inputs = zip(*(chunks(data, rank, mean.numel()) for rank in range(peers)), strict=True)
    square = exact_sum = exact_square = error_sum = 0.0
    for found, parts in zip(torch.split(mean, CHUNK), inputs, strict=True):
        exact = torch.zeros(found.numel(), dtype=torch.float64)
        for part in parts:
            exact.add_(part.double())
        exact.div_(peers)
        error = found.double() - exact
        square += float(error.square().sum())
        error_sum += float(error.sum())
        exact_sum += float(exact.sum())
        exact_square += float(exact.square().sum())
    count = mean.numel()
    deviation = (exact_square / count - (exact_sum / count) ** 2) ** 0.5
    return {
        "relative_error": (square / exact_square) ** 0.5,
        "bias_in_std": error_sum / count / deviation,
    }


def say(message: object) -> None:
    """One line to the parent."""
    print(json.dumps(message), flush=True)


async def hear() -> Any:
    """One line from the parent; it closes standard input to end us early."""
    line = await asyncio.to_thread(sys.stdin.readline)
    if not line:
        raise SystemExit("the parent has gone")
    return json.loads(line)


async def serve(system: System) -> None:
    """A worker's life."""
    config = system.config
    count = config["mib"] * (1 << 20) // 4
    values = await asyncio.to_thread(lambda: torch.cat(list(chunks(config["data"], system.rank, count))))
    say({"hello": await system.hello()})
    await system.meet(await hear())
    gc.collect()
    gc.freeze()  # as the daemon does once everything is imported
    first: torch.Tensor | None = None
    sign, carried = 1.0, False
    for number in itertools.count():
        warm = number >= config["warm_up"]  # until then zeros, of which error feedback keeps nothing
        await system.prepare(values, sign if warm else 0.0)
        say({"ready": True})
        command = await hear()
        if "finish" in command:
            break
        await _released(command["release_s"])
        cpu_s = time.process_time()
        ended_s, parts = await system.reduce()
        say({"ended_s": ended_s, "cpu_s": time.process_time() - cpu_s, **parts})
        lost = bool(parts.get("lost"))
        if warm and first is None and not lost and not carried:
            first = await asyncio.to_thread(lambda: system.mean().clone()) * sign
        carried = lost  # what a round leaves out comes with the next one
        if warm:
            sign = -sign  # so that weights stay near zero, where fp32 has its full resolution
    figures = await system.close()
    if system.rank == 0 and first is not None:
        figures |= await asyncio.to_thread(errors, config["data"], system.peers, first)
    say(figures)


async def _released(release_s: float) -> None:
    await asyncio.sleep(max(0.0, release_s - time.monotonic() - _SPIN_S))
    time.sleep(max(0.0, release_s - time.monotonic()))  # noqa: ASYNC251  for milliseconds, on purpose
