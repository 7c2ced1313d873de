"""A replica's local weights: the fp32 master, at most two compute versions, gradient and inner optimizer.

All on one device; or the master and the optimizer with it in the machine's memory, so that a device holds the
versions and the gradient alone (ZeRO-Offload, arXiv 2101.06840): 12 bytes a weight less for AdamW. On several
devices each holds its shards of all that: `devices.weights`.

Forward and backward of a micro-batch use one version from beginning to end; an inner step or a rebase
changes the master and publishes a new version without waiting for micro-batches in flight, unless both
versions are still in use: then the step waits, forwards go on, and the version that drains first is reused.
All methods but the asynchronous ones run on the compute lane, hence one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoal.training.inner import InnerOptimizer, Moments, norm_of
from shoal.training.lane import Lane
from shoal.training.model.layout import StageLayout
from shoal.training.model.split import Tape
from shoal.training.outer.local import Rebase, Sent, Take
from shoal.training.spec import RunSpec
from shoal.training.work import Work


@dataclass(slots=True, eq=False)
class Version:
    """One set of compute weights and how many micro-batches still need it."""

    flat: Any  # a vector in the compute type; on several devices `devices.stage.ShardedStage`
    users: int = 0


class Weights:
    """Implements `outer.local.LocalWeights`; the pipeline takes versions from it and adds gradients to it."""

    def __init__(
        self,
        spec: RunSpec,
        layout: StageLayout,
        initial: torch.Tensor,
        lane: Lane,
        device: str,
        *,
        host_optimizer: bool = False,
    ) -> None:
        self.size = layout.size
        self._lane = lane
        self._spec = spec
        self._gradient = torch.zeros(initial.numel(), device=device)
        self._stepped = (
            self._gradient
        )  # what the optimizer reads: the gradient itself, or its copy on the host
        if host_optimizer:
            self._stepped = torch.empty(initial.numel(), pin_memory=self._gradient.is_cuda)
        self._master = torch.empty_like(self._stepped, pin_memory=self._stepped.is_pinned()).copy_(
            initial.detach()
        )
        self._dtype = getattr(torch, spec.model.dtype)
        self._versions, self._current = [self._version()], 0
        self.current.flat.copy_(self._master)
        self._optimizer = InnerOptimizer(
            spec.inner, spec.stages.count, self._decayed(layout), self._master, self._stepped, self._norm
        )
        self._readers = 0  # of the optimizer's moments: steps wait for them, micro-batches do not
        self._behind = False  # the master changed since the current version was published
        self.pending_tokens = 0  # committed since the last inner step
        self.tokens = 0  # taken into inner steps since the start
        self.inner_steps = 0
        self._moves = 0  # changes of the master, by whatever
        self.gradient_norm = 0.0

    @property
    def current(self) -> Version:
        return self._versions[self._current]

    def take(self) -> Version:
        """The version a new micro-batch shall use, from forward to `release`."""
        self._publish()
        self.current.users += 1
        return self.current

    def release(self, version: Version) -> None:
        """The micro-batch has its input gradient, or is dropped."""
        version.users -= 1

    def add(self, tape: Tape) -> None:
        """A committed micro-batch's weight gradient."""
        tape.apply(self._gradient)

    @property
    def gradient(self) -> torch.Tensor:
        """Flat fp32 sum of the weight gradients committed since the last inner step."""
        return self._gradient

    def due(self) -> bool:
        """Whether an inner step may be made now (in `flush` mode only with nothing in flight)."""
        if self.pending_tokens < self._spec.inner.inner_tokens or self._readers:
            return False
        if self._spec.inner.mode == "flush":
            return all(version.users == 0 for version in self._versions)
        return self._free() is not None

    def step(self, learning_rate: float) -> None:
        """One inner step on the mean gradient of the tokens committed since the last."""
        if self._stepped is not self._gradient:
            self._stepped.copy_(self._gradient)
            self._gradient.zero_()
        self.gradient_norm = self._optimizer.step(self.pending_tokens, learning_rate)
        self.tokens += self.pending_tokens
        self.pending_tokens = 0
        self.inner_steps += 1
        self._moved()

    async def sent(self, span: slice, take: Take) -> Sent:
        """A copy of some of the master, between two inner steps."""
        return await self._lane.run(Work.UPDATE, self._copy, span, take)

    async def rebase(self, changes: Sequence[Rebase]) -> None:
        """w ← new + (w - old) for each changed span (design section 9)."""
        await self._lane.run(Work.UPDATE, self._rebase, changes)

    async def replace(self, weights: torch.Tensor) -> None:
        """Start anew from an anchor [size] fp32: a joiner, or a switch of chain."""
        await self._lane.run(Work.UPDATE, self._replace, weights)

    async def moments(self, offload: Callable[..., Awaitable[Any]]) -> Moments | None:
        """The optimizer's moments as of one inner step, copied by `offload` while micro-batches go on."""
        begun: list[int] = []  # known to the lane alone: a cancelled caller may not hear that it has begun

        def begin() -> None:
            begun.append(1)
            self._read(1)

        try:
            await self._lane.run(Work.UPDATE, begin)  # in its turn: no step is half made
            found: Moments | None = await offload(self._optimizer.moments)
            return found
        finally:
            self._lane.post(lambda: self._read(-len(begun)))

    async def restore(self, moments: Moments) -> None:
        """Go on with these moments: a restart, or a run that starts from a checkpoint."""
        await self._lane.run(Work.UPDATE, self._optimizer.restore, moments)

    def _version(self) -> Version:
        """A new one, its values still undefined."""
        return Version(torch.empty_like(self._gradient, dtype=self._dtype))

    def _decayed(self, layout: StageLayout) -> int:
        return layout.decayed

    def _norm(self, gradient: torch.Tensor) -> float:
        return norm_of(gradient)

    def _read(self, more: int) -> None:
        self._readers += more

    def _copy(self, span: slice, take: Take) -> Sent:
        return Sent(take(self._master[span]), self.inner_steps, self.tokens, self._moves)

    def _rebase(self, changes: Sequence[Rebase]) -> None:
        for change in changes:
            change.apply(self._master, self._moves)
        self._moved()

    def _replace(self, weights: torch.Tensor) -> None:
        self._master.copy_(weights)
        self._moved()

    def _moved(self) -> None:
        self._moves += 1
        self._behind = True
        self._publish()

    def _free(self) -> int | None:
        """The index of a version nobody uses; the current one first, so that one buffer often suffices."""
        if self.current.users == 0:
            return self._current
        if len(self._versions) == 1:
            self._versions.append(self._version())
        other = 1 - self._current
        return other if self._versions[other].users == 0 else None

    def _publish(self) -> None:
        if not self._behind:
            return
        free = self._free()
        if free is None:
            return
        self._versions[free].flat.copy_(self._master)
        self._current = free
        self._behind = False


def learning_rate(spec: RunSpec, log_tokens: int) -> float:
    """Warm-up, then cosine, over the tokens in the log head: equal on all replicas with that head.

    The warm-up counts one round ahead, for at the genesis the log has no tokens and the rate would be zero.
    """
    inner = spec.inner
    tokens = log_tokens + inner.inner_tokens * spec.outer.inner_steps
    if tokens < inner.warmup_tokens:
        return inner.learning_rate * tokens / inner.warmup_tokens
    span = max(inner.total_tokens - inner.warmup_tokens, 1)
    progress = min((tokens - inner.warmup_tokens) / span, 1.0)
    floor = inner.final_learning_rate_fraction
    return inner.learning_rate * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
