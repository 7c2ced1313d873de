"""A stage's weights for serving, at a byte each: matrices in int8 with a scale for each row.

A row is one output of its matrix, so a product is taken with the codes and scaled afterwards; the matrix
itself never exists but in slices that fit a cache, on the way back to the inputs neither.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from shoal.training.model.layout import Slot, StageLayout
from shoal.training.model.product import product as matrix_product

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
        flat = inputs.reshape(-1, columns)
        product: torch.Tensor = _Product.apply(flat, codes, self._row_scales(start, rows))  # type: ignore[no-untyped-call]
        return product.view(*inputs.shape[:-1], rows)

    def rows(self, slot: Slot, ids: torch.Tensor) -> torch.Tensor:
        """Those rows of a matrix, [..., n]."""
        scales = self._row_scales(slot.start, slot.shape[0])[ids]
        return (slot.view(self._codes)[ids] * scales[..., None]).to(self.dtype)

    def vector(self, start: int, count: int) -> torch.Tensor:
        """Norm scales or biases."""
        start -= self._layout.decayed
        return self._vectors[start : start + count]

    def _row_scales(self, start: int, rows: int) -> torch.Tensor:
        first = self._first_row[start]
        return self._scales[first : first + rows]


class _Product(torch.autograd.Function):
    """inputs [k, n] times codes [m, n] transposed, scaled by row; the gradient is that of the inputs."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        product = torch.cat([matrix_product(inputs, one.to(inputs.dtype)) for one in _slices(codes)], dim=1)
        return (product * scales).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        codes, scales = ctx.saved_tensors
        (gradient,) = gradients
        scaled = (gradient * scales).to(gradient.dtype)
        slices = _slices(codes)
        columns = torch.split(scaled, [len(one) for one in slices], dim=1)
        return sum(mine @ one.to(scaled.dtype) for mine, one in zip(columns, slices, strict=True)), None, None


def _slices(codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Whole rows that fit a cache together; a device with memory of its own takes all at once."""
    rows = len(codes) if codes.device.type != "cpu" else max(1, _SLICE // codes.shape[1])
    return torch.split(codes, rows)


def int8_bytes(layout: StageLayout, dtype: torch.dtype) -> int:
    """What `Int8Weights.nbytes` will be."""
    rows = sum(slot.shape[0] for slot in layout.slots if slot.start < layout.decayed)
    return layout.decayed + 4 * rows + dtype.itemsize * (layout.size - layout.decayed)
