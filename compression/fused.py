"""FusedCodec: a codec with compiled kernels beside a portable torch path that gives the same bits.

The kernels (`numba_kernels`) pass over a block once, in cache, without the GIL; they are used for CPU tensors
as soon as `kernels.warm` has built them. The portable path serves until then, and other devices.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from shoal.compression import kernels
from shoal.compression.codec import Buffer, Codec, CodecError, require_total, require_vector


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
        kernel = self._kernel("encode") if values.device.type == "cpu" else None
        if kernel is None:
            return self._encode(values).cpu().numpy().data
        result = np.empty(self.encoded_bytes(values.numel()), np.uint8)
        if not kernel(values.contiguous().numpy(), self.block, result):
            raise self.not_finite()
        return result.data

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
        kernel(flat, self.block, result)
        return torch.from_numpy(result)

    def add_decoded(self, data: Buffer, count: int, weight: float, total: torch.Tensor) -> float:
        kernel = self._kernel("add") if total.is_contiguous() else None
        if kernel is None:
            return super().add_decoded(data, count, weight, total)
        require_total(total, count)
        self.check(data, count)
        return float(kernel(np.frombuffer(data, np.uint8), self.block, np.float32(weight), total.numpy()))

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
