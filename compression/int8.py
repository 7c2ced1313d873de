"""Int8: 8-bit codes with a scale and an offset a block, so that one-sided values are not rounded one way.

For each block: offset = (min + max)/2 to the nearest bfloat16, scale = max|x − offset|/127 up to the next
one, code = round-half-even((x − offset)/scale), value = offset + code·scale; the product is exact (8 bits by
7). Layout: scales, offsets, codes.
"""

from __future__ import annotations

import numpy as np
import torch

from shoal.compression import kernels
from shoal.compression import scales as bfloat
from shoal.compression.codec import Buffer, CodecError, require_vectors
from shoal.compression.fused import NONE, Fault, FusedCodec, codes_of_zero_scales, in_blocks

BLOCKS = (256, 512, 1024)
_INVERSE_127 = float(np.float32(1 / 127))  # the code of the largest is 127 all the same, for scales round up


class Int8(FusedCodec):
    """1 + 4/block bytes a value."""

    name = "int8"

    def __init__(self, block: int = 256) -> None:
        if block not in BLOCKS:
            raise CodecError(f"int8: block {block}, one of {BLOCKS} expected")
        self.block = block
        self.tag = f"int8/{block}"

    def encoded_bytes(self, count: int) -> int:
        return count + 4 * self._blocks(count)

    def take(
        self,
        source: torch.Tensor,
        into: torch.Tensor,
        anchor: torch.Tensor,
        carried: torch.Tensor | None = None,
    ) -> tuple[float, Buffer] | None:
        if kernels.active is None or source.device.type != "cpu":
            return None
        require_vectors(source, into, anchor, carried)
        arrays = source.numpy(), anchor.numpy(), NONE if carried is None else carried.numpy()
        result = np.empty(self.encoded_bytes(source.numel()), np.uint8)
        square = kernels.active.int8_take(*arrays, self.block, into.numpy(), result)
        return None if square < 0.0 else (float(square), result.data)

    def _encode(self, values: torch.Tensor) -> torch.Tensor:
        if values.numel() == 0:
            return torch.empty(0, dtype=torch.uint8)
        blocks = in_blocks(values, self.block)
        low, high = torch.aminmax(blocks, dim=1)
        middle = low * 0.5 + high * 0.5
        if not bool(middle.isfinite().all()):
            raise self.not_finite()
        offsets = bfloat.nearest(middle)
        scales = bfloat.upwards(torch.maximum(high - offsets, offsets - low) * _INVERSE_127)
        if not bool((offsets.abs() + 127.0 * scales).isfinite().all()):
            raise self.not_finite()
        codes = (
            (blocks - offsets.unsqueeze(1)).mul_(bfloat.inverse(scales).unsqueeze(1)).round_().to(torch.int8)
        )
        return torch.cat(
            (
                bfloat.packed(scales),
                bfloat.packed(offsets),
                codes.view(-1)[: values.numel()].view(torch.uint8),
            )
        )

    def _fault(self, data: np.ndarray, count: int) -> Fault:
        border = 4 * self._blocks(count)
        if not bfloat.well_formed(data[:border]):
            return Fault.SCALE
        scales, offsets, codes = self._views(data, count)
        if not bool((scales >= 0.0).all()) or not bool((offsets.abs() + 127.0 * scales).isfinite().all()):
            return Fault.SCALE
        if count and (int(codes.min()) == -128 or codes_of_zero_scales(scales, codes, self.block)):
            return Fault.CODE
        return Fault.NONE

    def _decode(self, data: np.ndarray, count: int) -> torch.Tensor:
        scales, offsets, codes = self._views(data, count)
        padded = torch.zeros(self._blocks(count) * self.block)
        padded.numpy()[:count] = codes
        padded.view(-1, self.block).mul_(scales.unsqueeze(1)).add_(offsets.unsqueeze(1))
        return padded[:count]

    def _views(self, data: np.ndarray, count: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        scales, offsets, codes = np.split(data, (2 * self._blocks(count), 4 * self._blocks(count)))
        return bfloat.unpacked(scales), bfloat.unpacked(offsets), codes.view(np.int8)
