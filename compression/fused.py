"""FusedCodec: a codec with compiled kernels beside a portable torch path that gives the same bits.

The kernels (`numba_kernels`) pass over a block once, in cache, without the GIL; they are used for CPU tensors
as soon as `kernels.warm` has built them. The portable path serves until then, and other devices.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from shoal.compression import kernels
from shoal.compression.codec import Buffer, Codec, CodecError, require_total, require_vector, require_vectors

NONE = np.empty(0, np.float32)  # what a kernel takes for an array that is not wanted
_ONE = np.float32(1.0)
_PIECE = 1 << 15  # values that stay in a core's cache; a multiple of all blocks


class Fault(IntEnum):
    """What is wrong with bytes; kernels return the number."""

    NONE = 0
    SCALE = 1
    CODE = 2
    PADDING = 3


_FAULTS = {
    Fault.SCALE: "a scale or offset that no encoder makes",
    Fault.CODE: "a code that no encoder makes",
    Fault.PADDING: "bits set behind the last value",
}


class FusedCodec(Codec):
    """Dispatch of encode, check, decode and add_decoded; subclasses give sizes and the portable path."""

    name: str  # kernels are called {name}_encode, _check, _decode, _add
    block: int  # values that share a scale

    def encode(self, values: torch.Tensor) -> Buffer:
        require_vector(values)
        if values.device.type != "cpu" or self._kernel("encode") is None:
            return self._encode(values).cpu().numpy().data
        return self.encode_difference(values.contiguous())[0]

    def encode_difference(
        self,
        values: torch.Tensor,
        minus: torch.Tensor | None = None,
        plus: torch.Tensor | None = None,
        remainder: torch.Tensor | None = None,
        decay: float = 1.0,
    ) -> tuple[Buffer, float]:
        kernel = self._kernel("encode")
        if kernel is None:
            return super().encode_difference(values, minus, plus, remainder, decay)
        require_vectors(values, minus, plus, remainder)
        result = np.empty(self.encoded_bytes(values.numel()), np.uint8)
        arrays = [NONE if each is None else each.numpy() for each in (minus, plus)]
        left = NONE if remainder is None else remainder.numpy()
        lost = float(kernel(values.numpy(), *arrays, self.block, np.float32(decay), result, left))
        if lost < 0.0:
            raise self.not_finite()
        return result.data, lost

    def check(self, data: Buffer, count: int) -> None:
        self._check_size(data, count)
        flat = np.frombuffer(data, np.uint8)
        kernel = self._kernel("check")
        fault = Fault(kernel(flat, count, self.block)) if kernel else self._fault(flat, count)
        if fault is not Fault.NONE:
            raise CodecError(f"{self.tag}: {_FAULTS[fault]}")

    def decode(self, data: Buffer, count: int) -> torch.Tensor:
        self.check(data, count)
        flat = np.frombuffer(data, np.uint8)
        kernel = self._kernel("decode")
        if kernel is None:
            return self._decode(flat, count)
        result = np.empty(count, np.float32)
        kernel(flat, self.block, NONE, _ONE, result)
        return torch.from_numpy(result)

    def add_decoded(self, data: Buffer, count: int, weight: float, total: torch.Tensor) -> float:
        kernel = self._kernel("add") if total.is_contiguous() else None
        if kernel is None:
            return super().add_decoded(data, count, weight, total)
        require_total(total, count)
        self.check(data, count)
        flat = np.frombuffer(data, np.uint8)
        return float(kernel(flat, count, self.block, 0, np.float32(weight), total.numpy()))

    def weighted_sum(
        self, encoded: Sequence[tuple[Buffer, float]], count: int
    ) -> tuple[torch.Tensor, list[float | CodecError]]:
        """Piece by piece, so that a piece of the sum stays in a core's cache for all that is added to it."""
        kernel = self._kernel("add")
        if kernel is None:
            return super().weighted_sum(encoded, count)
        faults: dict[int, float | CodecError] = {}
        squares, total = [0.0] * len(encoded), np.empty(count, np.float32)
        for place, (data, _) in enumerate(encoded):
            try:
                self.check(data, count)
            except CodecError as error:
                faults[place] = error
        flat = [(np.frombuffer(data, np.uint8), np.float32(weight)) for data, weight in encoded]
        for start in range(0, count, _PIECE):
            piece = total[start : start + _PIECE]
            piece.fill(0.0)
            for place, (codes, weight) in enumerate(flat):
                if place not in faults:
                    squares[place] += kernel(codes, count, self.block, start // self.block, weight, piece)
        return torch.from_numpy(total), [faults.get(place, square) for place, square in enumerate(squares)]

    def subtract_decoded(self, data: Buffer, base: torch.Tensor, rate: float, result: torch.Tensor) -> None:
        kernel = self._kernel("decode")
        if kernel is None:
            return super().subtract_decoded(data, base, rate, result)
        require_vectors(base, result)
        self._check_size(data, base.numel())
        kernel(np.frombuffer(data, np.uint8), self.block, base.numpy(), np.float32(rate), result.numpy())

    @abstractmethod
    def _encode(self, values: torch.Tensor) -> torch.Tensor:
        """The bytes, on the device of `values`. Raises `not_finite`."""

    @abstractmethod
    def _fault(self, data: np.ndarray, count: int) -> Fault:
        """What is wrong with bytes of the right size."""

    @abstractmethod
    def _decode(self, data: np.ndarray, count: int) -> torch.Tensor:
        """The values of bytes without a fault."""

    def not_finite(self) -> CodecError:
        return CodecError(f"{self.tag}: values that are not finite, or too large to decode finite")

    def _blocks(self, count: int) -> int:
        return -(-count // self.block)

    def _kernel(self, step: str) -> Callable[..., Any] | None:
        return None if kernels.active is None else getattr(kernels.active, f"{self.name}_{step}")


def in_blocks(values: torch.Tensor, block: int) -> torch.Tensor:
    """[blocks, block], the last one filled up with its last value; a view where nothing is missing."""
    missing = -values.numel() % block
    if missing:
        values = torch.cat((values, values[-1:].expand(missing)))
    return values.reshape(-1, block)


def codes_of_zero_scales(scales: torch.Tensor, codes: np.ndarray, codes_per_block: int) -> bool:
    """Whether a block whose scale is 0 has a code that is not."""
    if codes.size == 0 or bool(scales.all()):
        return False
    used = np.bitwise_or.reduceat(codes, np.arange(0, codes.size, codes_per_block)) != 0
    return bool((used & (scales.numpy() == 0.0)).any())
