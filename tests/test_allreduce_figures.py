"""What the all-reduce benchmark calls an error: of a round that is whole, and carries nothing of another."""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import allreduce_harness as harness


def test_what_a_round_left_out_is_no_error_of_the_codec_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was: rounds of alternating sign cancelled out where one of them had been left out."""
    said: list[dict[str, Any]] = []
    commands = itertools.chain([{}], [{"release_s": 0.0}] * 4, [{"finish": True}])

    async def hear() -> Any:
        return next(commands)

    class Lossy(harness.System):
        """A mean over one peer; the first round leaves it out, the second brings both."""

        left: Any = 0.0
        rounds, found = 0, torch.zeros(0)

        async def hello(self) -> object:
            return 0

        async def meet(self, hellos: list[Any]) -> None:
            return

        async def prepare(self, values: torch.Tensor, sign: float) -> None:
            self.change = values * sign + self.left

        async def reduce(self) -> tuple[float, dict[str, float]]:
            self.rounds += 1
            lost = self.rounds == 1
            self.left, self.found = (self.change, 0 * self.change) if lost else (0.0, self.change)
            return 0.0, {"lost": float(lost)}

        def mean(self) -> torch.Tensor:
            return self.found

        async def close(self) -> dict[str, float]:
            return {}

    monkeypatch.setattr(harness, "hear", hear)
    monkeypatch.setattr(harness, "say", said.append)
    asyncio.run(
        harness.serve(
            Lossy({"rank": 0, "peers": 1, "codec": "fp32", "mib": 1, "data": "gaussian", "warm_up": 0})
        )
    )
    assert said[-1]["relative_error"] == 0.0
