"""Float32: the values as they are, little-endian. The reference the other codecs are measured against."""

from __future__ import annotations

import numpy as np
import torch

from shoal.compression.codec import Buffer, Codec, CodecError, require_vector


class Float32(Codec):
    """Four bytes a value, no loss."""

    tag = "float32"

    def encoded_bytes(self, count: int) -> int:
        return 4 * count

    def encode(self, values: torch.Tensor) -> Buffer:
        require_vector(values)
        array = values.cpu().numpy()
        if not np.isfinite(array).all():
            raise CodecError("float32: values that are not finite")
        return array.astype("<f4", copy=True).data.cast("B")

    def check(self, data: Buffer, count: int) -> None:
        self._check_size(data, count)
        if not np.isfinite(np.frombuffer(data, "<f4")).all():
            raise CodecError("float32: values that are not finite")

    def decode(self, data: Buffer, count: int) -> torch.Tensor:
        self.check(data, count)
        return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32, copy=True))
