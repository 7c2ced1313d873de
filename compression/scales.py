"""Block scales in two bytes: bfloat16 that is zero or a normal number, never −0, infinite or NaN.

Rounding is done on the bits, for a bfloat16 instruction may flush what is denormal; dividing by a constant is
avoided, for a device may multiply by the inverse. So each step gives the same bits everywhere.
"""

from __future__ import annotations

import numpy as np
import torch

# Smallest normal fp32, and bfloat16: below it a scale has too few bits, and its inverse may not be finite.
SMALLEST = float(np.finfo(np.float32).tiny)


def nearest(values: torch.Tensor) -> torch.Tensor:
    """Finite fp32 rounded to bfloat16, half to even, as fp32; what is below SMALLEST becomes 0."""
    bits = values.view(torch.int32)
    return _widened((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


def upwards(values: torch.Tensor) -> torch.Tensor:
    """Finite fp32, none negative, rounded up to bfloat16, as fp32; what is below SMALLEST becomes 0."""
    return _widened((values.view(torch.int32) + 0xFFFF) >> 16)


def inverse(scales: torch.Tensor) -> torch.Tensor:
    """1/scale, and 0 for 0: values of a block without a scale get the code 0."""
    return torch.where(scales == 0.0, 0.0, torch.ones_like(scales) / scales)


def packed(scales: torch.Tensor) -> torch.Tensor:
    """[n] fp32 that hold bfloat16 values -> [2n] bytes."""
    return (scales.view(torch.int32) >> 16).to(torch.int16).view(torch.uint8)


def unpacked(data: np.ndarray) -> torch.Tensor:
    """[2n] bytes -> [n] fp32, whatever the bytes are."""
    return torch.from_numpy(data.view("<u2").astype(np.uint32) << 16).view(torch.float32)


def well_formed(data: np.ndarray) -> bool:
    """Whether [2n] bytes are scales that an encoder makes; positive or negative."""
    bits = data.view("<u2")
    exponents = bits & 0x7F80
    return bool(((bits == 0) | ((exponents != 0) & (exponents != 0x7F80))).all())


def _widened(bits: torch.Tensor) -> torch.Tensor:
    values = (bits << 16).view(torch.float32)
    return torch.where(values.abs() < SMALLEST, 0.0, values)
