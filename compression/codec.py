"""Codec: how a vector of fp32 values becomes bytes and back. The interface; `registry` finds one by name.

Rounds use one for contributions and one for the published mean. A codec is a value: no state, no randomness,
equal input gives equal bytes on every machine, because each step rounds once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

Buffer = bytes | bytearray | memoryview


class CodecError(ValueError):
    """Values that must not be encoded (not finite, too large), or bytes that no encoder makes."""


class Codec(ABC):
    """Encodes flat fp32 CPU tensors. Stateless and thread-safe; the work takes milliseconds a megabyte."""

    tag: str  # names the format, block size included

    @abstractmethod
    def encoded_bytes(self, count: int) -> int:
        """Exactly how many bytes `count` values take."""

    @abstractmethod
    def encode(self, values: torch.Tensor) -> Buffer:
        """The bytes of `values` [count] fp32. Raises CodecError for input that is not finite."""

    @abstractmethod
    def check(self, data: Buffer, count: int) -> None:
        """Raises CodecError unless `decode` would give `count` finite values. Cheaper than decoding."""

    @abstractmethod
    def decode(self, data: Buffer, count: int) -> torch.Tensor:
        """`count` finite fp32 values, in memory of their own. Raises what `check` raises."""

    def _check_size(self, data: Buffer, count: int) -> None:
        expected = self.encoded_bytes(count)
        found = memoryview(data).nbytes
        if found != expected:
            raise CodecError(f"{self.tag}: {found} bytes for {count} values, {expected} expected")


def bytes_of(values: torch.Tensor) -> memoryview:
    """The memory of a flat CPU tensor, without a copy."""
    return values.numpy().data.cast("B")


def require_vector(values: torch.Tensor) -> None:
    """Raises CodecError unless `values` is a flat fp32 CPU tensor."""
    if values.dtype is not torch.float32 or values.dim() != 1 or values.device.type != "cpu":
        raise CodecError(f"a flat fp32 CPU tensor is needed, not {values.dtype} {tuple(values.shape)}")
