"""How far a driver's inner steps have come in its data streams: the positions that the log records.

A position is the number of samples from the stream's beginning that are all in inner steps. Whoever goes on
there skips none; what had come out of order, at most the micro-batches in flight, it reads again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_STEPS_KEPT = 256  # an undecided round may ask for positions of some steps ago


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A micro-batch, and where it comes from."""

    tokens: torch.Tensor  # int64 [B, T+1]
    stream: int
    start: int  # position of its first sample
    samples: int


class StreamBook:
    """Of one driver. All methods are called on the event loop."""

    def __init__(self) -> None:
        self._in_flight: dict[int, Drawn] = {}  # by id of the tokens, which it keeps alive
        self._ends: dict[int, int] = {}  # stream -> up to where all is in the gradient or in steps
        self._ahead: dict[int, dict[int, int]] = {}  # stream -> start -> samples, beyond that
        self._steps = 0
        self._positions: deque[tuple[int, dict[int, int]]] = deque([(0, {})], _STEPS_KEPT)

    def read(self, positions: Mapping[int, int]) -> None:
        """From now on these streams, each from its position; those known already go on as they are."""
        self._ends = {stream: self._ends.get(stream, position) for stream, position in positions.items()}
        self._ahead = {stream: self._ahead.get(stream, {}) for stream in positions}
        self._positions.append((self._steps, dict(self._ends)))

    def draw(self, batch: Drawn) -> torch.Tensor:
        """A micro-batch begins; returns its tokens."""
        self._in_flight[id(batch.tokens)] = batch
        return batch.tokens

    def add(self, tokens: torch.Tensor, stepped: bool) -> None:
        """Its gradient was added, and an inner step made with it or not."""
        batch = self._in_flight.pop(id(tokens), None)
        if batch is not None and batch.stream in self._ends:
            ahead = self._ahead[batch.stream]
            ahead[batch.start] = batch.samples
            while (samples := ahead.pop(self._ends[batch.stream], None)) is not None:
                self._ends[batch.stream] += samples
        if stepped:
            self._steps += 1
            self._positions.append((self._steps, dict(self._ends)))

    def at(self, step: int) -> tuple[tuple[int, int], ...]:
        """(stream, samples) of all streams as of an inner step of this process."""
        known = [positions for made, positions in self._positions if made <= step]
        return tuple(sorted((known[-1] if known else {}).items()))
