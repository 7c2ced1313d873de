"""Micro-batches that nobody has to read from a disk: random tokens of a few kinds, so the loss can fall."""

from __future__ import annotations

import torch

from shoal.training.spec import RunSpec

_KINDS = 8


class RandomFeed:
    """Implements `training.feed.Feed`, without end; `seed` is its stream's number, too."""

    def __init__(self, spec: RunSpec, seed: int) -> None:
        self._spec = spec
        self._generator = torch.Generator().manual_seed(seed)
        self._stream = seed
        self._drawn = 0

    async def next_batch(self) -> torch.Tensor:
        self._drawn += self._spec.inner.micro_batch_sequences
        shape = (self._spec.inner.micro_batch_sequences, self._spec.model.sequence + 1)
        return torch.randint(0, _KINDS, shape, generator=self._generator)

    def position(self) -> tuple[int, int]:
        return self._stream, self._drawn

    def resume(self, position: int) -> None:
        self._drawn = position

    def held_out(self) -> torch.Tensor:
        return torch.arange(self._spec.model.sequence + 1).remainder(_KINDS).repeat(2, 1)
