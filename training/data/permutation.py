"""A keyed shuffle of range(size) that is computed, not stored: position in, position out."""

from __future__ import annotations

import math
import struct

from blake3 import blake3

_ROUNDS = 6
_MASK = 2**64 - 1


class Permutation:
    """A bijection of range(size), one of many by its key; equal on every machine.

    A Feistel network over pairs (row, column) with addition modulo the number of rows or columns (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002, where it is called generalised Feistel). The
    rectangle has fewer than sqrt(size) cells too many; from those one walks on until inside.
    """

    def __init__(self, size: int, key: bytes) -> None:
        if size < 1:
            raise ValueError("a permutation needs something to permute")
        self.size = size
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        self._keys = struct.unpack(f"<{_ROUNDS}Q", blake3(key).digest(length=8 * _ROUNDS))

    def __getitem__(self, index: int) -> int:
        """Where `index`, in [0, size), goes."""
        while True:
            index = self._pass(index)
            if index < self.size:
                return index

    def _pass(self, index: int) -> int:
        row, column = divmod(index, self._columns)
        for number, key in enumerate(self._keys):
            if number % 2:
                column = (column + _mix(row ^ key)) % self._columns
            else:
                row = (row + _mix(column ^ key)) % self._rows
        return row * self._columns + column


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on every bit."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
