"""Which token comes next. Pure: logits, the tokens before, the options and the position decide.

The order is that of `transformers`: penalty, bias, temperature, top-k, top-p. The one random number comes
from the seed and the position, so a server that takes over draws the same token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from blake3 import blake3

from shoal.protocol.errors import NotHere
from shoal.training.serving.messages import SamplingOptions

_GREEDY_BELOW = 1e-4  # of temperature: the likeliest is drawn anyway, and smaller ones overflow scores


def next_token(logits: torch.Tensor, before: Sequence[int], options: SamplingOptions) -> int:
    """The token after `before`, of its logits fp32 [vocabulary]; greedy at temperature 0, or next to it.

    Where several are equally likely, greedy takes the lowest id. Raises NotHere where NaN or infinity
    is the largest logit.
    """
    scores = adjusted(logits, before, options)
    if not math.isfinite(float(scores.max())):
        raise NotHere(f"no token {len(before)} can be drawn here: the model's scores are not finite")
    if options.temperature < _GREEDY_BELOW:
        return int(torch.argmax(scores))
    kept = filtered(scores.double() / options.temperature, options)
    cumulative = torch.softmax(kept, dim=0).cumsum(dim=0)
    drawn = uniform(options.seed, len(before)) * float(cumulative[-1])
    chosen = int(torch.searchsorted(cumulative, drawn, right=True))
    return min(chosen, int(torch.nonzero(kept.isfinite())[-1]))


def adjusted(logits: torch.Tensor, before: Sequence[int], options: SamplingOptions) -> torch.Tensor:
    """Logits after repetition penalty (CTRL, arXiv 1909.05858) and bias."""
    scores = logits.clone()
    if options.repetition_penalty != 1.0 and before:
        seen = torch.tensor(sorted(set(before)))
        old = scores[seen]
        penalty = options.repetition_penalty
        scores[seen] = torch.where(old < 0, old * penalty, old / penalty)
    for entry in options.bias:
        if entry.token < len(scores):
            scores[entry.token] += entry.bias
    return scores


def filtered(scores: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Scores with those outside top-k and top-p at minus infinity; at least one stays."""
    if 0 < options.top_k < len(scores):
        least = torch.topk(scores, options.top_k).values[-1]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if options.top_p < 1.0:
        rising, order = torch.sort(scores, stable=True)
        outside = torch.softmax(rising, dim=0).cumsum(dim=0) <= 1.0 - options.top_p
        outside[-1] = False
        scores = scores.masked_fill(torch.zeros_like(outside).scatter(0, order, outside), -torch.inf)
    return scores


def uniform(seed: int, position: int) -> float:
    """In [0, 1), from seed and position alone."""
    digest = blake3(b"sample" + seed.to_bytes(8, "big") + position.to_bytes(8, "big")).digest(length=8)
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53
