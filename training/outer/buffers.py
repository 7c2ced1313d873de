"""Buffers: memory of whole fragments that is used again as soon as nobody reads it any more.

A round needs several vectors of a fragment's size. Fresh ones cost a page fault every 4 KiB: a third of the
CPU time of a round of 100 MiB, for allocators give blocks this large back to the system at once.
"""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np
import torch

_KEPT = 3  # free buffers of one size: a copy of local weights, an anchor, a momentum


class Buffers:
    """One replica's. Safe to use from several threads."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)

    def take(self, count: int) -> torch.Tensor:
        """[count] fp32 CPU, not initialised; its memory comes back when the last tensor on it is gone."""
        free = self._free[count]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(count, np.float32)
        lent = memory[:]
        weakref.finalize(lent, _give_back, free, memory).atexit = False
        return torch.from_numpy(lent)


def _give_back(free: list[np.ndarray], memory: np.ndarray) -> None:
    if len(free) < _KEPT:
        free.append(memory)
