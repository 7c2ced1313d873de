"""Copies of long vectors that go past the cache: local weights before a round, and the anchor after it.

A usual copy reads the lines that it is about to overwrite, and drives out what others need: 100 MiB take it
12 to 14 ms of a core, and this one 8.4. Called by `training`; the kernel is in `numba_kernels`.
"""

from __future__ import annotations

import torch

from shoal.compression import kernels

_THREADS = 2  # of torch, up to which one is enough; with more its own copy is sooner through
_LEAST = 1 << 18  # values: of fewer the cache holds source and copy


def copy(source: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """into ← source, both [n], which must not overlap; `into` comes back."""
    if kernels.active is None or source.numel() < _LEAST or torch.get_num_threads() > _THREADS:
        return into.copy_(source)
    for values in (source, into):
        if values.dtype is not torch.float32 or values.device.type != "cpu" or not values.is_contiguous():
            return into.copy_(source)
    kernels.active.copy(source.numpy(), into.numpy())
    return into
