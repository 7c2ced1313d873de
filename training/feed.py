"""Where a driver's micro-batches come from: its own stream over the corpus, read off the loop.

The trainer takes any `Feed`; `CorpusFeed` is the real one, tests hand in lists.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import torch


class Feed(Protocol):
    """An endless, resumable source of micro-batches."""

    async def next_batch(self) -> torch.Tensor:
        """Tokens int64 [B, T+1]."""

    def position(self) -> tuple[int, int]:
        """(stream id, samples drawn so far): what the first stage's log records."""

    def held_out(self) -> torch.Tensor:
        """A fixed batch of held-out tokens int64 [B, T+1]."""


class ListFeed:
    """The given micro-batches, once each; afterwards it waits for ever. For tests."""

    def __init__(self, batches: list[torch.Tensor], stream: int = 0) -> None:
        self._batches = list(batches)
        self._drawn = 0
        self._stream = stream

    async def next_batch(self) -> torch.Tensor:
        if self._drawn == len(self._batches):
            await asyncio.get_running_loop().create_future()
        self._drawn += 1
        return self._batches[self._drawn - 1]

    def position(self) -> tuple[int, int]:
        return self._stream, self._drawn

    def held_out(self) -> torch.Tensor:
        return self._batches[0]
