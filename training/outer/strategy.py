"""The outer optimizer: Nesterov momentum on the mean delta of a round, part by part.

    m ← μ·m + Δ̄;   a ← a − η·(Δ̄ + μ·m)      plain: a ← a − η·m        (DiLoCo, notes outer-sync B)

Every peer runs this on the same decoded bytes. Each operation is a separate elementwise multiplication or
addition that rounds once in fp32, so that no machine can fuse two of them and differ in the last bit (P1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoal.compression.codec import Buffer, Codec
from shoal.training.spec import OuterSection


@dataclass(frozen=True, slots=True)
class OuterStrategy:
    """Outer rate η, momentum μ, and which form."""

    learning_rate: float
    momentum: float
    nesterov: bool

    @classmethod
    def of(cls, outer: OuterSection) -> OuterStrategy:
        """As the spec says."""
        return cls(outer.learning_rate, outer.momentum, outer.nesterov)

    def step(
        self,
        codec: Codec,
        mean: Buffer,
        anchor: torch.Tensor,
        momentum: torch.Tensor,
        after: torch.Tensor,
        velocity: torch.Tensor,
    ) -> None:
        """One outer step of anchor and momentum [n] fp32, into `after` and `velocity`.

        `mean` is the mean delta in bytes that `codec.check` has passed. Without momentum `velocity` stays.
        """
        if self.momentum == 0.0:
            codec.subtract_decoded(mean, anchor, self.learning_rate, after)
            return
        change = codec.decode(mean, anchor.numel())
        torch.mul(momentum, self.momentum, out=velocity).add_(change)
        if self.nesterov:
            change.add_(torch.mul(velocity, self.momentum)).mul_(self.learning_rate)
        else:
            torch.mul(velocity, self.learning_rate, out=change)
        torch.sub(anchor, change, out=after)

    def reenter(
        self, codec: Codec, mean: Buffer, anchor: torch.Tensor, scale: float, after: torch.Tensor
    ) -> None:
        """A mean of a lost chain, outside the momentum: `after` ← a − η·scale·Δ̄ (design section 9)."""
        codec.subtract_decoded(mean, anchor, self.learning_rate * scale, after)
