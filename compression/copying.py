"""Copies of long vectors that go past the cache: local weights before a round, and the anchor after it.

A usual copy reads the lines that it is about to overwrite, and drives out what others need: 100 MiB take it
12 to 14 ms of a core, and this one 8.4. Called by `training`; the kernel is in `numba_kernels`.
"""

from __future__ import annotations

import numpy as np
import torch

from shoal.compression import kernels
from shoal.compression.codec import require_vectors

_THREADS = 2  # of torch, up to which one is enough; with more its own copy is sooner through
_LEAST = 1 << 18  # values: of fewer the cache holds source and copy
_PIECE = 1 << 15  # values that stay in a core's cache
_NONE = np.empty(0, np.float32)


def copy(source: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """into ← source, both [n], which must not overlap; `into` comes back."""
    if kernels.active is None or source.numel() < _LEAST or torch.get_num_threads() > _THREADS:
        return into.copy_(source)
    for values in (source, into):
        if values.dtype is not torch.float32 or values.device.type != "cpu" or not values.is_contiguous():
            return into.copy_(source)
    kernels.active.copy(source.numpy(), into.numpy())
    return into


def take(
    source: torch.Tensor, into: torch.Tensor, anchor: torch.Tensor, carried: torch.Tensor | None = None
) -> float:
    """into ← source, and ‖anchor − source + carried‖² to 1e-6 of it; not finite where one of them is not.

    All [count] fp32, and but for `source` on the CPU. One pass for both: memory is what they wait for.
    """
    require_vectors(into, anchor, carried)
    if kernels.active is None or source.device.type != "cpu":
        into.copy_(source)
        return _square(into, anchor, carried)
    require_vectors(source, into)
    plus = _NONE if carried is None else carried.numpy()
    return float(kernels.active.take(source.numpy(), anchor.numpy(), plus, into.numpy()))


def _square(sent: torch.Tensor, anchor: torch.Tensor, carried: torch.Tensor | None) -> float:
    total = 0.0
    for start in range(0, sent.numel(), _PIECE):
        piece = slice(start, start + _PIECE)
        delta = anchor[piece] - sent[piece]
        if carried is not None:
            delta += carried[piece]
        total += float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
    return total
