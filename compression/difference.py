"""The norm of what a contribution would encode, for whoever has to tell it first. Called by rounds."""

from __future__ import annotations

import numpy as np
import torch

from shoal.compression import kernels
from shoal.compression.codec import require_vectors

_NONE = np.empty(0, np.float32)


def squared_norm(values: torch.Tensor, minus: torch.Tensor, plus: torch.Tensor | None) -> float:
    """‖values − minus + plus‖² (to 1e-6 of itself), all [count] fp32 CPU; not finite where a value is not."""
    require_vectors(values, minus, plus)
    if kernels.active is None:
        delta = values - minus if plus is None else (values - minus).add_(plus)
        return float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
    more = _NONE if plus is None else plus.numpy()
    return float(kernels.active.squared_norm(values.numpy(), minus.numpy(), more))
