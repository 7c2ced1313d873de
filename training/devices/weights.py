"""A replica's local weights as shards: `Weights`, whose vectors on each rank hold that rank's part alone.

Every rank runs the same methods in the same order, so that all agree which version is whose and when; rank 0
begins each with a command, by which the others follow. Steps are made shard by shard, with one norm over all.
The world outside (rounds, checkpoints) deals with rank 0 and whole vectors in the machine's memory.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from shoal.training.devices.shards import Shards
from shoal.training.devices.stage import ShardedStage
from shoal.training.inner import Moments, norm_of
from shoal.training.lane import Lane
from shoal.training.model.layout import StageLayout
from shoal.training.model.split import Tape
from shoal.training.outer.local import Rebase, Sent, Take
from shoal.training.spec import RunSpec
from shoal.training.weights import Version, Weights
from shoal.training.work import Work

Command = Callable[..., AbstractContextManager[None]]  # (what, *numbers): the others do it meanwhile


class ShardWeights(Weights):
    """See the module. What callers see of it is what they see of `Weights`."""

    def __init__(
        self,
        spec: RunSpec,
        layout: StageLayout,
        own: torch.Tensor,
        lane: Lane,
        shards: Shards,
        command: Command,
        *,
        host_optimizer: bool = False,
    ) -> None:
        """`own`: this rank's of the initial weights, as `Shards.dealt`."""
        self._shards = shards
        self._command = command
        super().__init__(spec, layout, own, lane, str(shards.ranks.device), host_optimizer=host_optimizer)

    def add(self, tape: Tape) -> None:
        """Each rank's gradients of a span, summed: in float32, whatever they were computed in."""
        for span in self._shards.spans:
            partial = torch.zeros(span.count, device=self._shards.ranks.device)
            tape.apply_within(partial, span.start)
            self._shards.reduce(span, partial, self._gradient)

    def step(self, learning_rate: float) -> None:
        with self._command("step", self.pending_tokens, learning_rate):
            super().step(learning_rate)

    async def moments(self, offload: Callable[..., Awaitable[Any]]) -> Moments | None:
        """On the lane: nothing else of the devices can go on while the shards are brought together."""
        return await self._lane.run(Work.UPDATE, self.read_moments)

    async def restore(self, moments: Moments) -> None:
        await self._lane.run(Work.UPDATE, self.restore_moments, moments, moments.steps)

    def read(self, start: int, stop: int, into: torch.Tensor | None) -> None:
        """Master values start..stop, into rank 0's `into`."""
        with self._command("read", start, stop):
            for span, of_span, of_wanted in self._shards.within(start, stop):
                gathered = self._shards.gather(span, self._master)
                if into is not None:
                    into[of_wanted].copy_(gathered[of_span])

    def rebase_within(self, start: int, stop: int, change: Rebase | None) -> None:
        """One change of the master, made by rank 0 a span at a time."""
        with self._command("rebase", start, stop):
            for span, of_span, of_change in self._shards.within(start, stop):
                gathered = self._shards.gather(span, self._master)
                if change is not None:
                    piece = Rebase(
                        0, change.old[of_change], change.new[of_change], change.alpha, change.moves
                    )
                    piece.apply(gathered[of_span], self._moves)
                self._shards.scatter(span, gathered, self._master)

    def moved(self) -> None:
        """The master is what it shall be: publish it."""
        with self._command("moved"):
            self._moved()

    def read_moments(self) -> Moments | None:
        """Whole ones on rank 0; None where there are none yet."""
        with self._command("moments"):
            own = self._optimizer.moments()
            if own is None:
                return None
            device = self._shards.ranks.device
            return Moments(
                own.steps, *(self._shards.whole(part.to(device)) for part in (own.mean, own.square))
            )

    def restore_moments(self, moments: Moments | None, steps: int) -> None:
        """Rank 0 has them whole."""
        with self._command("restore", steps):
            mean, square = (moments.mean, moments.square) if moments is not None else (None, None)
            dealt = self._shards.dealt
            self._optimizer.restore(Moments(steps, dealt(mean), dealt(square)))

    def _copy(self, span: slice, take: Take) -> Sent:
        start, stop, _ = span.indices(self.size)
        whole = torch.empty(stop - start)
        self.read(start, stop, whole)
        return Sent(take(whole), self.inner_steps, self.tokens, self._moves)

    def _rebase(self, changes: Sequence[Rebase]) -> None:
        for change in changes:
            self.rebase_within(change.start, change.start + change.old.numel(), change)
        self.moved()

    def _replace(self, weights: torch.Tensor) -> None:
        self._rebase([Rebase(0, weights, weights, 0.0)])

    def _version(self) -> Version:
        return Version(ShardedStage(self._shards, self._dtype))

    def _decayed(self, layout: StageLayout) -> int:
        return self._shards.decayed

    def _norm(self, gradient: torch.Tensor) -> float:
        own = norm_of(gradient)
        return math.sqrt(self._shards.ranks.total(own * own))
