"""Codec: how a vector of fp32 values becomes bytes and back. The interface; `registry` finds one by name.

Rounds use one for contributions and one for the published mean. A codec is a value: no state, no randomness,
equal input gives equal bytes on every machine, because each step rounds once. Formats are little-endian.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

Buffer = bytes | bytearray | memoryview


class CodecError(ValueError):
    """Values that must not be encoded (not finite, too large), or bytes that no encoder makes."""


class Codec(ABC):
    """Encodes flat fp32 tensors. Stateless and thread-safe; the work takes milliseconds a megabyte."""

    tag: str  # names the format, block size included
    needs_feedback: bool = False  # what it loses has to be kept and sent with the next (below 8 bits)
    exact: bool = True  # encoded_bytes is the size itself; false: the most it can be

    @abstractmethod
    def encoded_bytes(self, count: int) -> int:
        """How many bytes `count` values take; the most they take unless `exact`."""

    @abstractmethod
    def encode(self, values: torch.Tensor) -> Buffer:
        """The bytes of `values` [count] fp32, on any device: only the bytes come down.

        Raises CodecError for values that are not finite, or so large that they would not decode finite.
        """

    def encode_difference(
        self,
        values: torch.Tensor,
        minus: torch.Tensor | None = None,
        plus: torch.Tensor | None = None,
        remainder: torch.Tensor | None = None,
        decay: float = 1.0,
    ) -> tuple[Buffer, float]:
        """The bytes of x = values − minus + plus, all [count] fp32 CPU, and ‖remainder‖² (to 1e-6 of it).

        `remainder` becomes decay·(x − decoded); it may be `plus` itself. Raises what `encode` raises.
        """
        delta = values.clone() if minus is None else values - minus
        if plus is not None:
            delta.add_(plus)
        data = self.encode(delta)
        if remainder is None:
            return data, 0.0
        torch.sub(delta, self.decode(data, delta.numel()), out=remainder).mul_(decay)
        return data, _square(remainder)

    def take(
        self,
        source: torch.Tensor,
        into: torch.Tensor,
        anchor: torch.Tensor,
        carried: torch.Tensor | None = None,
    ) -> tuple[float, Buffer] | None:
        """What `copying.take` does, and the bytes of anchor − source + carried, by a codec with a pass for
        both and feeds nothing back. None where it has not, or they cannot be encoded: nothing is taken then.
        """
        return None

    @abstractmethod
    def check(self, data: Buffer, count: int) -> None:
        """Raises CodecError unless an encoder makes `data` of `count` values. Cheaper than decoding."""

    @abstractmethod
    def decode(self, data: Buffer, count: int) -> torch.Tensor:
        """`count` finite fp32 values, in CPU memory of their own. Raises what `check` raises."""

    def add_decoded(self, data: Buffer, count: int, weight: float, total: torch.Tensor) -> float:
        """total [count] fp32 += fp32(weight) · decoded, each operation rounding once; ‖decoded‖² comes back.

        Equal bit for bit to `total.add_(decode(data, count).mul_(weight))`, for a total that holds no −0.0 (a
        sum begun at zeros never does). The squared norm is right to 1e-6 of itself. Raises what `check`
        raises, and has not touched `total` then.
        """
        require_total(total, count)
        values = self.decode(data, count)
        square = _square(values)
        total.add_(values.mul_(weight))
        return square

    def weighted_sum(
        self, encoded: Sequence[tuple[Buffer, float]], count: int
    ) -> tuple[torch.Tensor, list[float | CodecError]]:
        """Σ weight·decoded [count] fp32, added up as by `add_decoded` in this order, from zeros.

        And of each what that returns; or what it raises: then it is not in the sum.
        """
        total, found = torch.zeros(count), list[float | CodecError]()
        for data, weight in encoded:
            try:
                found.append(self.add_decoded(data, count, weight, total))
            except CodecError as error:
                found.append(error)
        return total, found

    def subtract_decoded(self, data: Buffer, base: torch.Tensor, rate: float, result: torch.Tensor) -> None:
        """result ← base − fp32(rate)·decoded, each operation rounding once; [count] fp32 CPU both.

        Of bytes that `check` has passed: it is not done again.
        """
        torch.sub(base, self.decode(data, base.numel()).mul_(rate), out=result)

    def _check_size(self, data: Buffer, count: int) -> None:
        expected = self.encoded_bytes(count)
        found = memoryview(data).nbytes
        if found != expected:
            raise CodecError(f"{self.tag}: {found} bytes for {count} values, {expected} expected")


def _square(values: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(values, dtype=torch.float64))
    return norm * norm


def bytes_of(values: torch.Tensor) -> memoryview:
    """The memory of a flat CPU tensor, without a copy."""
    return values.numpy().data.cast("B")


def require_vector(values: torch.Tensor) -> None:
    """Raises CodecError unless `values` is a flat fp32 tensor."""
    if values.dtype is not torch.float32 or values.dim() != 1:
        raise CodecError(f"a flat fp32 tensor is needed, not {values.dtype} {tuple(values.shape)}")


def require_vectors(first: torch.Tensor, *others: torch.Tensor | None) -> None:
    """Raises CodecError unless all (None aside) are flat, contiguous fp32 CPU tensors of one length."""
    for vector in (first, *(other for other in others if other is not None)):
        require_vector(vector)
        if vector.device.type != "cpu" or not vector.is_contiguous() or vector.numel() != first.numel():
            raise CodecError(f"{first.numel()} values in one piece on the CPU are needed")


def require_total(total: torch.Tensor, count: int) -> None:
    """Raises CodecError unless `total` is a flat fp32 CPU tensor of `count` values."""
    require_vector(total)
    if total.device.type != "cpu" or total.numel() != count:
        raise CodecError(
            f"a total of {count} values on the CPU is needed, not {total.numel()} on {total.device}"
        )
