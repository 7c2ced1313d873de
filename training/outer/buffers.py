"""Buffers: memory of whole fragments that is used again as soon as nobody reads it any more.

A round needs several vectors of a fragment's size, or of its parts'. Fresh ones cost a page fault every
4 KiB: a third of the CPU time of a round of 100 MiB, for allocators give large blocks back to the system.
"""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np
import torch

_LINE = 16  # floats in a line of the cache
_KEPT = 3  # free buffers of the largest size: a copy of local weights, an anchor, a momentum; else as much


class Buffers:
    """One replica's. Safe to use from several threads."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[np.ndarray]] = defaultdict(list)
        self._largest = 0

    def take(self, count: int) -> torch.Tensor:
        """[count] fp32 CPU, not initialised; its memory comes back when the last tensor on it is gone."""
        free = self._free[count]
        self._largest = max(self._largest, count)
        try:
            memory = free.pop()
        except IndexError:
            memory = _in_lines(count)
        lent = memory[:]
        most = _KEPT * (self._largest // max(count, 1))
        weakref.finalize(lent, _give_back, free, memory, most).atexit = False
        return torch.from_numpy(lent)


def _in_lines(count: int) -> np.ndarray:
    """So that whole lines can be written without being read first (`compression.copying`)."""
    memory = np.empty(count + _LINE, np.float32)
    first = -memory.ctypes.data // 4 % _LINE
    return memory[first : first + count]


def _give_back(free: list[np.ndarray], memory: np.ndarray, most: int) -> None:
    if len(free) < most:
        free.append(memory)
