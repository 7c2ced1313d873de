"""Where a driver's micro-batches come from: its own stream over the corpus, read off the loop.

The trainer takes any `Feed`; `CorpusFeed` is the real one, tests hand in lists.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from shoal.training.data.corpus import open_corpus
from shoal.training.data.stream import Stream, held_out
from shoal.training.data.tokenizer import load_tokenizer
from shoal.training.spec import RunSpec

_HELD_OUT_BATCHES = 2


class Feed(Protocol):
    """An endless, resumable source of micro-batches."""

    async def next_batch(self) -> torch.Tensor:
        """Tokens int64 [B, T+1]."""

    def position(self) -> tuple[int, int]:
        """(stream id, samples drawn so far): what the first stage's log records."""

    def resume(self, position: int) -> None:
        """Go on where the log says that this stream stood."""

    def held_out(self) -> torch.Tensor:
        """Held-out tokens int64 [N, T+1], the same on every machine with the same corpus."""


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

    def resume(self, position: int) -> None:
        self._drawn = position

    def held_out(self) -> torch.Tensor:
        return self._batches[0]


class CorpusFeed:
    """The run's corpus on this machine, in the order of one stream."""

    def __init__(self, stream: Stream, scored: torch.Tensor, offload: Callable[..., Awaitable[Any]]) -> None:
        self._stream = stream
        self._scored = scored
        self._offload = offload
        self._drawing = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        spec: RunSpec,
        cache_dir: Path,
        stream_id: int,
        offload: Callable[..., Awaitable[Any]],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> CorpusFeed:
        """Open or build the corpus. Raises SpecError for missing data, StorageError for the disk."""

        def build() -> tuple[Stream, torch.Tensor]:
            corpus = open_corpus(spec, load_tokenizer(spec.data), cache_dir, progress)
            sequences, length = spec.inner.micro_batch_sequences, spec.model.sequence
            scored = held_out(corpus, length, sequences, _HELD_OUT_BATCHES)
            stream = Stream(corpus, spec.run.seed, stream_id, length, sequences)
            return stream, torch.from_numpy(np.concatenate([batch.tokens for batch in scored]))

        stream, scored = await offload(build)
        return cls(stream, scored, offload)

    async def next_batch(self) -> torch.Tensor:
        async with self._drawing:
            batch = await self._offload(self._stream.next)
        return torch.from_numpy(batch.tokens)

    def position(self) -> tuple[int, int]:
        return self._stream.state()

    def held_out(self) -> torch.Tensor:
        return self._scored

    def resume(self, position: int) -> None:
        self._stream.resume(position)
