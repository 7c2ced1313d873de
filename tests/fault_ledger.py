"""The oracle of the fault tests on real processes: one number a part that counts what inner steps added.

Every inner step of a worker adds a known multiple of one fixed pattern (`fault_orders.step_of`). So the
agreed state is genesis plus a multiple of the pattern in each part, which follows from the entries alone, and
a replica's weights are that plus its own steps that no entry lists yet: each is in once, none twice (P4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from fault_orders import start_of, step_of

from shoal.protocol.identity import PeerId
from shoal.training.outer.entry import Entry, seats_in
from shoal.training.outer.parts import Part, cut
from shoal.training.spec import RunSpec

_ROUNDING = 2e-5  # of genesis and some steps in fp32 ...
_ROUNDING_OF_ENTRY = 1e-6  # ... and of each entry; a step that is in twice weighs a thousand times as much
Process = tuple[PeerId, int]  # peer and incarnation


class ScalarLedger:
    """Counts in fp64. Holds for fp32 on the wire; rounding codecs need their residuals counted, too."""

    def __init__(self, spec: RunSpec, size: int, seed: int, numbers: Mapping[PeerId, int]) -> None:
        outer = spec.outer
        self._outer = outer
        self._seed = seed
        self._numbers = numbers
        self._fragments = cut(size, outer.part_bytes, spec.compression.block, outer.fragments)
        self._parts = [part for fragment in self._fragments for part in fragment.parts]
        self._genesis, self._pattern = start_of(seed, size)
        self._moved = [0.0] * len(self._parts)
        self._velocity = [0.0] * len(self._parts)
        self._entries = 0
        self._listed: dict[tuple[Process, int], int] = {}  # process and part -> its last listed step

    def read(self, entries: Sequence[Entry]) -> None:
        """Take in the whole log, in order."""
        for entry in entries:
            self._entries += 1
            for number, part in enumerate(self._fragments[entry.fragment].parts):
                seats = seats_in(entry.listed_in(number))
                if seats:
                    self._advance(part.index, self._mean(entry, part.index, seats))

    def _mean(self, entry: Entry, part: int, seats: set[int]) -> float:
        rows = [row for row in entry.contributors if row.seat in seats]
        tokens = sum(row.tokens for row in rows)
        mean = 0.0
        for row in rows:
            seat = entry.roster[row.seat]
            process = seat.peer, seat.incarnation
            steps = self._steps(process, self._listed.get((process, part), 0), row.to_step)
            mean -= row.clip * row.tokens / tokens * steps
            self._listed[process, part] = row.to_step
        return mean

    def _advance(self, part: int, mean: float) -> None:
        """The outer step: SGD with momentum, as torch writes it."""
        outer = self._outer
        self._velocity[part] = outer.momentum * self._velocity[part] + mean
        look_ahead = mean + outer.momentum * self._velocity[part]
        self._moved[part] -= outer.learning_rate * (look_ahead if outer.nesterov else self._velocity[part])

    def check(self, process: Process, steps: int, anchor: torch.Tensor, weights: torch.Tensor) -> None:
        """Raises AssertionError where a process that made so many steps has other tensors, [size] fp32."""
        for part in self._parts:
            moved = self._moved[part.index]
            ahead = self._steps(process, self._listed.get((process, part.index), 0), steps)
            self._compare(f"anchor of {process}", part, anchor, moved)
            self._compare(f"weights of {process}", part, weights, moved + ahead)

    def _compare(self, what: str, part: Part, found: torch.Tensor, moved: float) -> None:
        expected = self._genesis[part.span].double() + moved * self._pattern[part.span].double()
        error = (found[part.span].double() - expected).abs().max().item()
        if not error <= _ROUNDING + self._entries * _ROUNDING_OF_ENTRY:
            raise AssertionError(f"{what}, part {part.index}: off by up to {error:.2e}")

    def _steps(self, process: Process, first: int, last: int) -> float:
        peer, incarnation = process
        number = self._numbers[peer]
        return sum(step_of(self._seed, number, incarnation, step) for step in range(first, last))
