"""Which token comes next: greedy, or drawn at a temperature from a seeded generator. Pure."""

from __future__ import annotations

import random

import torch


def next_token(logits: torch.Tensor, temperature: float, rng: random.Random) -> int:
    """One token of logits fp32 [vocabulary]; at temperature 0 the largest, the lower id on a tie."""
    if temperature <= 0:
        return int(torch.argmax(logits))
    weights = torch.softmax(logits.double() / temperature, dim=0)
    return rng.choices(range(len(weights)), weights=weights.tolist())[0]
