"""Micro-batches that nobody has to read from a disk: random tokens of a few kinds, so the loss can fall."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shoal.training.data.stream_book import Drawn
from shoal.training.feed import Turns
from shoal.training.spec import RunSpec

_KINDS = 8


class RandomFeed:
    """Implements `training.feed.Feed`, without end; `seed` is its stream's number, too."""

    def __init__(self, spec: RunSpec, seed: int) -> None:
        self.own = seed
        self._spec = spec
        self._generator = torch.Generator().manual_seed(seed)
        self._turns = Turns()

    async def next_batch(self) -> Drawn:
        samples = self._spec.inner.micro_batch_sequences
        stream, position = await self._turns.take(samples)
        shape = (samples, self._spec.model.sequence + 1)
        tokens = torch.randint(0, _KINDS, shape, generator=self._generator)
        return Drawn(tokens, stream, position, samples)

    def read(self, positions: Mapping[int, int]) -> None:
        self._turns.read(positions)

    def reads(self) -> dict[int, int]:
        """Its streams and what was drawn of each."""
        return dict(sorted(self._turns.positions.items()))

    def held_out(self) -> torch.Tensor:
        return torch.arange(self._spec.model.sequence + 1).remainder(_KINDS).repeat(2, 1)
