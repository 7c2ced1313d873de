"""The inner optimizer of one replica: AdamW or SGD on the stage's flat vector, clipped per stage.

Called by `weights` on the compute lane. torch's own fused optimizer does the arithmetic; the flat vector is
cut in two parameters, matrices (decayed) and norm scales (not).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from shoal.training.spec import InnerSection


def norm_of(gradient: torch.Tensor) -> float:
    """Of a whole stage's gradient."""
    return float(torch.linalg.vector_norm(gradient))


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """AdamW's state after some steps: mean and mean square [size] fp32 CPU, ordered like the weights."""

    steps: int
    mean: torch.Tensor
    square: torch.Tensor


class InnerOptimizer:
    """Steps `master` in place with `gradient`, a sum over tokens, and zeroes the gradient."""

    def __init__(
        self,
        inner: InnerSection,
        stages: int,
        decayed: int,
        master: torch.Tensor,
        gradient: torch.Tensor,
        norm: Callable[[torch.Tensor], float] = norm_of,
    ) -> None:
        """`decayed`: values before the norm scales and biases. `norm`: of the stage's whole gradient, where
        this is but a shard of it."""
        self._gradient = gradient
        self._norm = norm
        # No global norm exists across stages; independent norms of S stages add up to c when each is c/√S.
        self._clip_norm = inner.clip_norm / math.sqrt(stages)
        groups: list[dict[str, Any]] = []
        for span, decay in (
            (slice(0, decayed), inner.weight_decay),
            (slice(decayed, None), 0.0),
        ):
            parameter = torch.nn.Parameter(master[span])
            parameter.grad = gradient[span]
            groups.append({"params": [parameter], "weight_decay": decay})
        self._parameters = [parameter for group in groups for parameter in group["params"]]
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
        norm = self._norm(self._gradient)
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

    def moments(self) -> Moments | None:
        """A copy on the host; None before the first step and for SGD. No step may be made meanwhile."""
        states = [self._optimizer.state.get(parameter, {}) for parameter in self._parameters]
        if not all("exp_avg" in state for state in states):
            return None
        mean, square = (_on_host([state[key] for state in states]) for key in ("exp_avg", "exp_avg_sq"))
        return Moments(int(states[0]["step"]), mean, square)

    def restore(self, moments: Moments) -> None:
        """Go on from these; SGD has no use for them."""
        if not isinstance(self._optimizer, torch.optim.AdamW):
            return
        start = 0
        for parameter in self._parameters:
            span = slice(start, start + parameter.numel())
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(moments.steps), device=parameter.device),
                "exp_avg": moments.mean[span].to(parameter.device, copy=True),
                "exp_avg_sq": moments.square[span].to(parameter.device, copy=True),
            }
            start = span.stop


def _on_host(pieces: list[torch.Tensor]) -> torch.Tensor:
    """One flat CPU copy; from a GPU on a stream of its own, beside what the lane computes."""
    if pieces[0].device.type != "cuda":
        return torch.cat(pieces)
    found = torch.empty(sum(piece.numel() for piece in pieces), dtype=pieces[0].dtype, pin_memory=True)
    aside = torch.cuda.Stream(pieces[0].device)  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.default_stream(pieces[0].device))
    with torch.cuda.stream(aside):
        start = 0
        for piece in pieces:
            found[start : start + piece.numel()].copy_(piece, non_blocking=True)
            start += piece.numel()
    aside.synchronize()
    return found
