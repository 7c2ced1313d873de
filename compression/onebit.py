"""OneBit: the sign of each value, and the mean magnitude of its block of 256.

The mean is Σ|x|/256 by halves (the first 128 of a block plus the last 128, and so on), a sum that any device
can do in the same order; of a last block with n values, times 256/n. Relative error on Gaussian values 0.60,
so it needs error feedback (1-bit Adam, arXiv 2102.02888). Layout: means as bfloat16, then bits, 1 for
negative, the first value in the lowest bit.
"""

from __future__ import annotations

import numpy as np
import torch

from shoal.compression import scales as bfloat
from shoal.compression.fused import Fault, FusedCodec, codes_of_zero_scales


class OneBit(FusedCodec):
    """1/8 + 2/256 bytes a value."""

    name = "onebit"
    block = 256
    tag = "onebit/256"
    needs_feedback = True

    def encoded_bytes(self, count: int) -> int:
        return -(-count // 8) + 2 * self._blocks(count)

    def _encode(self, values: torch.Tensor) -> torch.Tensor:
        count = values.numel()
        if count == 0:
            return torch.empty(0, dtype=torch.uint8)
        blocks = torch.nn.functional.pad(values, (0, -count % self.block)).view(-1, self.block)
        means = (blocks.abs() * (1 / self.block)).view(-1, self.block)
        while means.shape[1] > 1:
            half = means.shape[1] // 2
            means = means[:, :half] + means[:, half:]
        means = means.view(-1)
        means[-1] *= self.block / (count - (means.numel() - 1) * self.block)
        if not bool(means.isfinite().all()):
            raise self.not_finite()
        scales = bfloat.nearest(means)
        if not bool(scales.isfinite().all()):
            raise self.not_finite()
        negative = ((blocks < 0.0) & (scales > 0.0).unsqueeze(1)).view(torch.uint8).view(-1, 8)
        bits = negative[:, 0].clone()
        for place in range(1, 8):
            bits |= negative[:, place] << place
        return torch.cat((bfloat.packed(scales), bits[: -(-count // 8)]))

    def _fault(self, data: np.ndarray, count: int) -> Fault:
        border = 2 * self._blocks(count)
        scales = bfloat.unpacked(data[:border])
        if not bfloat.well_formed(data[:border]) or not bool((scales >= 0.0).all()):
            return Fault.SCALE
        if count % 8 and data[-1] >> count % 8:
            return Fault.PADDING
        return Fault.CODE if codes_of_zero_scales(scales, data[border:], self.block // 8) else Fault.NONE

    def _decode(self, data: np.ndarray, count: int) -> torch.Tensor:
        border = 2 * self._blocks(count)
        signs = torch.zeros(self._blocks(count) * self.block)
        signs.numpy()[:count] = np.unpackbits(data[border:], count=count, bitorder="little")
        blocks = signs.mul_(-2.0).add_(1.0).view(-1, self.block)
        return blocks.mul_(bfloat.unpacked(data[:border]).unsqueeze(1)).view(-1)[:count]
