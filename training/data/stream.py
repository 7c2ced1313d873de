"""A driver's own order of the training samples, and the held-out samples that all share.

A sample is `sequence` + 1 consecutive tokens; the next one begins at its last token, so every token but the
first is predicted once in an epoch. A stream is named by a number and has a position, the samples drawn so
far: with both, another driver goes on exactly where one died. Reading touches the disk: call it off the
event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.protocol.errors import SpecError
from shoal.training.data.corpus import Corpus
from shoal.training.data.permutation import Permutation


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Tokens int64 [B, T+1]: inputs are all but the last column, targets all but the first."""

    tokens: np.ndarray
    position: int  # of its first sample: `resume` here draws the batch again


class Stream:
    """Samples of a corpus in the order of (seed, stream_id, epoch); in an epoch none comes twice."""

    def __init__(
        self, corpus: Corpus, seed: int, stream_id: int, sequence: int, batch_sequences: int
    ) -> None:
        """Raises SpecError when the corpus holds no sample."""
        self.stream_id = stream_id
        self._corpus = corpus
        self._seed = seed
        self._sequence = sequence
        self._batch_sequences = batch_sequences
        self._position = 0
        self.epoch_samples = _samples(corpus.training, sequence)
        self._epoch = -1
        self._order = Permutation(1, b"")

    def next(self) -> Batch:
        """The next `batch_sequences` samples; at the end of an epoch the rest comes from the next."""
        position = self._position
        starts = [self._start(position + row) for row in range(self._batch_sequences)]
        self._position += self._batch_sequences
        return Batch(_gather(self._corpus.training, starts, self._sequence), position)

    def state(self) -> tuple[int, int]:
        """(stream id, samples drawn so far)."""
        return self.stream_id, self._position

    def resume(self, position: int) -> None:
        """Go on after the first `position` samples, as if they had been drawn here."""
        self._position = position

    def _start(self, position: int) -> int:
        epoch, index = divmod(position, self.epoch_samples)
        if epoch != self._epoch:
            key = f"stream/{self._seed}/{self.stream_id}/{epoch}".encode()
            self._epoch, self._order = epoch, Permutation(self.epoch_samples, key)
        return self._order[index] * self._sequence


def held_out(corpus: Corpus, sequence: int, batch_sequences: int, batches: int) -> tuple[Batch, ...]:
    """At most `batches` batches of held-out samples, spread evenly over the held-out part; the same for all.

    Where it holds fewer samples than asked for, all of them; then the last batch may have fewer rows.
    Raises SpecError when it holds none.
    """
    samples = _samples(corpus.held_out, sequence)
    wanted = min(samples, batches * batch_sequences)
    starts = [index * samples // wanted * sequence for index in range(wanted)]
    return tuple(
        Batch(_gather(corpus.held_out, starts[first : first + batch_sequences], sequence), first)
        for first in range(0, wanted, batch_sequences)
    )


def _samples(tokens: np.ndarray, sequence: int) -> int:
    samples = (len(tokens) - 1) // sequence
    if samples < 1:
        raise SpecError(
            f"{len(tokens)} tokens hold no sequence of {sequence} and its last target; add text to data.paths"
        )
    return samples


def _gather(tokens: np.ndarray, starts: Sequence[int], sequence: int) -> np.ndarray:
    """int64 [B, sequence + 1]."""
    return np.stack([tokens[start : start + sequence + 1] for start in starts]).astype(np.int64)
