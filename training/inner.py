"""The inner optimizer of one replica: AdamW or SGD on the stage's flat vector, clipped per stage.

Called by `weights` on the compute lane. torch's own fused optimizer does the arithmetic; the flat vector is
cut in two parameters, matrices (decayed) and norm scales (not).
"""

from __future__ import annotations

import math

import torch

from shoal.training.model.layout import StageLayout
from shoal.training.spec import InnerSection


class InnerOptimizer:
    """Steps `master` in place with `gradient`, a sum over tokens, and zeroes the gradient."""

    def __init__(
        self,
        inner: InnerSection,
        stages: int,
        layout: StageLayout,
        master: torch.Tensor,
        gradient: torch.Tensor,
    ) -> None:
        self._gradient = gradient
        # No global norm exists across stages; independent norms of S stages add up to c when each is c/√S.
        self._clip_norm = inner.clip_norm / math.sqrt(stages)
        groups = []
        for span, decay in (
            (slice(0, layout.decayed), inner.weight_decay),
            (slice(layout.decayed, None), 0.0),
        ):
            parameter = torch.nn.Parameter(master[span])
            parameter.grad = gradient[span]
            groups.append({"params": [parameter], "weight_decay": decay})
        self._optimizer: torch.optim.Optimizer
        if inner.optimizer == "adamw":
            self._optimizer = torch.optim.AdamW(
                groups, betas=(inner.beta1, inner.beta2), eps=inner.epsilon, fused=True
            )
        else:
            self._optimizer = torch.optim.SGD(groups)

    @torch.no_grad()
    def step(self, tokens: int, learning_rate: float) -> float:
        """Step on the mean gradient over `tokens`; returns its norm before clipping.

        A gradient that is not finite is dropped whole (the norm returned says so): one overflow must not
        reach the weights, and from them the other replicas.
        """
        self._gradient.div_(tokens)
        norm = float(torch.linalg.vector_norm(self._gradient))
        if not math.isfinite(norm):
            self._gradient.zero_()
            return norm
        if 0.0 < self._clip_norm < norm:
            self._gradient.mul_(self._clip_norm / norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._gradient.zero_()
        return norm
