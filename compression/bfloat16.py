"""Bfloat16: the upper half of each fp32 value, rounded half to even. Half the bytes, at most 2^-8 off."""

from __future__ import annotations

import numpy as np
import torch

from shoal.compression.codec import Buffer, Codec, CodecError, require_vector


class Bfloat16(Codec):
    """Two bytes a value."""

    tag = "bfloat16"

    def encoded_bytes(self, count: int) -> int:
        return 2 * count

    def encode(self, values: torch.Tensor) -> Buffer:
        require_vector(values)
        if values.numel() and not bool(torch.stack(torch.aminmax(values)).bfloat16().isfinite().all()):
            raise CodecError(f"{self.tag}: values that are not finite, or too large")
        return values.bfloat16().view(torch.int16).cpu().numpy().astype("<i2", copy=False).data.cast("B")

    def check(self, data: Buffer, count: int) -> None:
        self._check_size(data, count)
        if ((np.frombuffer(data, "<u2") & 0x7F80) == 0x7F80).any():
            raise CodecError(f"{self.tag}: values that are not finite")

    def decode(self, data: Buffer, count: int) -> torch.Tensor:
        self.check(data, count)
        bits = np.frombuffer(data, "<u2").astype(np.uint32)
        bits <<= 16
        return torch.from_numpy(bits.view(np.float32))
