"""What a worker of the fault tests is told at its birth, and what follows from it by heart.

Shared by the worker, by the group that starts it and by the ledger that counts after it.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
from blake3 import blake3

from shoal.protocol.identity import PeerKey

LINE_BYTES = 16 << 20
STEP_SIZE = 0.01
JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Order:
    """What makes a worker."""

    socket: str
    errors: str  # a file for its standard error
    number: int
    incarnation: int
    seed: int
    token: str
    spec: JsonObject
    size: int = 0  # of the stage, in values
    directory: str | None = None  # of snapshots and journal
    upload_bytes_per_s: float | None = None  # None: no limit
    stage: int | None = None  # of a `pipeline_worker`; None: a `fault_worker`
    moves: bool = False  # it goes to another stage when the plan says so

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def key_of(seed: int, number: int) -> PeerKey:
    """A worker's identity is the same in each of its lives."""
    return PeerKey.from_seed(blake3(f"worker {seed}/{number}".encode()).digest())


def tokens_of(number: int) -> int:
    """Of each inner step of a worker."""
    return 100 + 10 * number


def start_of(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(genesis, pattern), both [size] fp32: every inner step adds a multiple of the pattern."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator), torch.randn(size, generator=generator)


def step_of(seed: int, number: int, incarnation: int, step: int) -> float:
    """How much of the pattern an inner step adds, steps counted from 0."""
    return STEP_SIZE * random.Random(f"{seed}/{number}/{incarnation}/{step}").uniform(0.5, 1.5)
