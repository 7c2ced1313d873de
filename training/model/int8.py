"""A stage's weights for serving, at a byte each: matrices in int8 with a scale for each row.

A row is one output of its matrix, so a product is taken with the codes and scaled afterwards; the matrix
itself never exists but in slices that fit a cache. No gradients; `dense` is for who needs them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as functional

from shoal.training.model.layout import Slot, StageLayout

_MOST = 127  # symmetric: -128 is not used
# Values of a slice, 512 KiB in float32: it stays in a core's second cache between its making and its use.
# 4096 x 1024 times one row on one core: 0.8 to 1.0 ms so, 2.0 ms with the whole matrix made first
_SLICE = 1 << 17


class Int8Weights:
    """Stands where a stage's flat vector stands in `StageModel`, without a tape."""

    def __init__(
        self,
        layout: StageLayout,
        parameters: Iterable[tuple[Slot, torch.Tensor]],
        dtype: torch.dtype,
        device: str,
    ) -> None:
        """`parameters`: each with its values, fp32 of its shape; one at a time is in memory, if need be.

        `dtype` is that of the products, and of norm scales and biases.
        """
        self.dtype, self.device = dtype, torch.device(device)
        self._layout = layout
        matrices = [slot for slot in layout.slots if slot.start < layout.decayed]
        rows = [0, *itertools.accumulate(slot.shape[0] for slot in matrices)]
        self._first_row = {slot.start: first for slot, first in zip(matrices, rows, strict=False)}
        self._codes = torch.empty(layout.decayed, dtype=torch.int8, device=device)
        self._scales = torch.empty(rows[-1], dtype=torch.float32, device=device)
        self._vectors = torch.empty(layout.size - layout.decayed, dtype=dtype, device=device)
        for slot, values in parameters:
            self._put(slot, values)

    def _put(self, slot: Slot, values: torch.Tensor) -> None:
        if slot.start >= self._layout.decayed:
            start = slot.start - self._layout.decayed
            self._vectors[start : start + slot.count] = values.flatten()
            return
        first = self._first_row[slot.start]
        largest = values.abs().amax(dim=1)
        scales = largest / _MOST
        divisors = torch.where(scales > 0, scales, 1.0)
        codes = (values / divisors[:, None]).round_().clamp_(-_MOST, _MOST)
        self._scales[first : first + len(scales)] = scales
        slot.view(self._codes).copy_(codes)

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self._codes.nbytes + self._scales.nbytes + self._vectors.nbytes

    def linear(self, inputs: torch.Tensor, start: int, rows: int) -> torch.Tensor:
        """inputs [..., n] times the transposed matrix of `rows` rows that begins at `start` of the vector."""
        columns = inputs.shape[-1]
        codes = self._codes[start : start + rows * columns].view(rows, columns)
        scales = self._row_scales(start, rows)
        flat = inputs.reshape(-1, columns)
        if flat.device.type != "cpu":
            product = functional.linear(flat, codes.to(self.dtype))
        else:
            slices = torch.split(codes, max(1, _SLICE // columns))
            product = torch.cat([functional.linear(flat, one.to(self.dtype)) for one in slices], dim=1)
        return (product * scales).to(self.dtype).view(*inputs.shape[:-1], rows)

    def rows(self, slot: Slot, ids: torch.Tensor) -> torch.Tensor:
        """Those rows of a matrix, [..., n]."""
        scales = self._row_scales(slot.start, slot.shape[0])[ids]
        return (slot.view(self._codes)[ids] * scales[..., None]).to(self.dtype)

    def vector(self, start: int, count: int) -> torch.Tensor:
        """Norm scales or biases."""
        start -= self._layout.decayed
        return self._vectors[start : start + count]

    def dense(self) -> torch.Tensor:
        """The flat vector [size] that these weights stand for."""
        flat = torch.empty(self._layout.size, dtype=self.dtype, device=self.device)
        flat[self._layout.decayed :] = self._vectors
        for slot in self._layout.slots:
            if slot.start < self._layout.decayed:
                scales = self._row_scales(slot.start, slot.shape[0])
                slot.view(flat).copy_(slot.view(self._codes) * scales[:, None])
        return flat

    def _row_scales(self, start: int, rows: int) -> torch.Tensor:
        first = self._first_row[start]
        return self._scales[first : first + rows]


def int8_bytes(layout: StageLayout, dtype: torch.dtype) -> int:
    """What `Int8Weights.nbytes` will be."""
    rows = sum(slot.shape[0] for slot in layout.slots if slot.start < layout.decayed)
    return layout.decayed + 4 * rows + dtype.itemsize * (layout.size - layout.decayed)
