"""Local weights as rounds see them: one flat fp32 vector that inner steps move. Interface and memory twin.

`training/weights.py` implements it for real replicas; `MemoryWeights` for tests and the simulator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from shoal.compression.copying import copy


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """A copy of some local weights, taken between two inner steps: the `s` of design section 9."""

    weights: torch.Tensor  # [n] fp32 CPU
    inner_step: int  # steps since the process started
    tokens: int  # taken into those steps
    moves: int = -1  # how often the weights had changed, by steps and rebases


@dataclass(frozen=True, slots=True, eq=False)
class Rebase:
    """One change of base: w[start : start+n] ← new + (w[start : start+n] − old).

    With `alpha` the merge of Streaming DiLoCo (arXiv 2501.18512, algorithm 2) instead, which gives up the
    share (1 − alpha) of the steps since: w ← alpha·w + (1 − alpha)·new.
    `moves`: of the Sent that `old` is from; where nothing has changed since, w is `old`, and w ← new.
    """

    start: int
    old: torch.Tensor  # [n] fp32 CPU
    new: torch.Tensor  # [n] fp32 CPU
    alpha: float | None = None
    moves: int = -1

    def apply(self, weights: torch.Tensor, moves: int) -> None:
        """In place, to the whole stage's `weights` [size] on any device, which have changed `moves` times."""
        span = weights[self.start : self.start + self.old.numel()]
        if (
            self.alpha is None and moves == self.moves
        ):  # a round shorter than an inner step: half of the memory traffic
            copy(self.new, span)
            return
        pieces = (torch.split(tensor, _PIECE) for tensor in (span, self.old, self.new))
        for weight, old, new in zip(*pieces, strict=True):
            if self.alpha is None:
                weight.sub_(old.to(weight.device)).add_(new.to(weight.device))
            elif self.alpha == 0.0:
                weight.copy_(new)  # whatever was there, a number or not
            else:
                weight.mul_(self.alpha).add_(torch.mul(new.to(weight.device), 1.0 - self.alpha))


_PIECE = 1 << 17  # values that stay in a core's cache between two passes


Take = Callable[[torch.Tensor], torch.Tensor]  # a copy [n] fp32 CPU of weights [n] on any device


class LocalWeights(Protocol):
    """The weights that inner steps change while rounds go on."""

    size: int  # fp32 values of the stage, in canonical parameter order
    inner_steps: int  # since the process started
    tokens: int  # taken into those steps

    async def sent(self, span: slice, take: Take) -> Sent:
        """A copy of some of them, which `take` makes of them, atomically between inner steps."""

    async def rebase(self, changes: Sequence[Rebase]) -> None:
        """All changes at once, between inner steps."""


class MemoryWeights:
    """A plain vector whose inner steps the caller makes by hand."""

    def __init__(self, initial: torch.Tensor) -> None:
        self.size = initial.numel()
        self.weights = initial.clone()
        self.inner_steps = 0
        self.tokens = 0
        self._moves = 0

    def step(self, change: torch.Tensor, tokens: int) -> None:
        """One inner step: add `change` [size]."""
        self.weights.add_(change)
        self.inner_steps += 1
        self.tokens += tokens
        self._moves += 1

    async def sent(self, span: slice, take: Take) -> Sent:
        return self.sent_now(span, take)

    async def rebase(self, changes: Sequence[Rebase]) -> None:
        self.rebase_now(changes)

    def sent_now(self, span: slice, take: Take) -> Sent:
        """What `sent` returns."""
        return Sent(take(self.weights[span]), self.inner_steps, self.tokens, self._moves)

    def rebase_now(self, changes: Sequence[Rebase]) -> None:
        """What `rebase` does."""
        for change in changes:
            change.apply(self.weights, self._moves)
        self._moves += 1
