"""Where a driver's micro-batches come from: its streams over the corpus in turns, read off the loop.

The trainer takes any `Feed`; `CorpusFeed` is the real one, tests hand in lists.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from shoal.training.data.corpus import open_corpus
from shoal.training.data.stream import Stream, held_out
from shoal.training.data.stream_book import Drawn
from shoal.training.data.tokenizer import load_tokenizer
from shoal.training.spec import RunSpec

_HELD_OUT_BATCHES = 2


class Feed(Protocol):
    """An endless, resumable source of micro-batches."""

    own: int  # the stream that this driver begins when there is no other to go on with

    async def next_batch(self) -> Drawn:
        """The next micro-batch; waits while it has no stream to read."""

    def read(self, positions: Mapping[int, int]) -> None:
        """From now on these streams in turns, each after so many samples; those it reads already go on."""

    def held_out(self) -> torch.Tensor:
        """Held-out tokens int64 [N, T+1], the same on every machine with the same corpus."""


class Turns:
    """Which stream is next, and where each one stands; for feeds."""

    def __init__(self) -> None:
        self.positions: dict[int, int] = {}  # in the order of their turns
        self._some = asyncio.Event()

    def read(self, positions: Mapping[int, int]) -> None:
        """As `Feed.read`."""
        self.positions = {s: self.positions.get(s, position) for s, position in positions.items()}
        if self.positions:
            self._some.set()
        else:
            self._some.clear()

    async def take(self, samples: int) -> tuple[int, int]:
        """(stream, position) to draw so many samples from."""
        await self._some.wait()
        stream = next(iter(self.positions))
        position = self.positions.pop(stream)
        self.positions[stream] = position + samples  # the others come first now
        return stream, position


class CorpusFeed:
    """The run's corpus on this machine, in the orders of its streams."""

    def __init__(
        self,
        own: int,
        make: Callable[[int], Stream],
        samples: int,
        scored: torch.Tensor,
        offload: Callable[..., Awaitable[Any]],
    ) -> None:
        """`make`: a stream by its number; `samples`: of a micro-batch."""
        self.own = own
        self._make = make
        self._samples = samples
        self._scored = scored
        self._offload = offload
        self._turns = Turns()
        self._streams: dict[int, Stream] = {}
        self._drawing = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        spec: RunSpec,
        cache_dir: Path,
        own: int,
        offload: Callable[..., Awaitable[Any]],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> CorpusFeed:
        """Open or build the corpus. Raises SpecError for missing data, StorageError for the disk."""

        def build() -> tuple[Callable[[int], Stream], torch.Tensor]:
            corpus = open_corpus(spec, load_tokenizer(spec.data), cache_dir, progress)
            sequences, length = spec.inner.micro_batch_sequences, spec.model.sequence
            scored = held_out(corpus, length, sequences, _HELD_OUT_BATCHES)

            def make(stream: int) -> Stream:
                return Stream(corpus, spec.run.seed, stream, length, sequences)

            make(own)  # a corpus that holds no sample is found out now
            return make, torch.from_numpy(np.concatenate([batch.tokens for batch in scored]))

        make, scored = await offload(build)
        return cls(own, make, spec.inner.micro_batch_sequences, scored, offload)

    async def next_batch(self) -> Drawn:
        async with self._drawing:
            number, position = await self._turns.take(self._samples)
            batch = await self._offload(self._draw, number, position)
        return Drawn(torch.from_numpy(batch.tokens), number, position, self._samples)

    def read(self, positions: Mapping[int, int]) -> None:
        self._turns.read(positions)

    def held_out(self) -> torch.Tensor:
        return self._scored

    def _draw(self, number: int, position: int) -> Any:
        stream = self._streams.setdefault(number, self._make(number))
        stream.resume(position)
        return stream.next()
