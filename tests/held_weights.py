"""A stage's weights as one flat vector, whatever form a server holds them in."""

from __future__ import annotations

import torch

from shoal.training.model.int8 import Int8Weights
from shoal.training.model.layout import StageLayout
from shoal.training.model.stage import Held


def dense(held: Held, layout: StageLayout) -> torch.Tensor:
    """The vector [size]; of int8 weights, what they stand for."""
    if not isinstance(held, Int8Weights):
        return held
    flat = torch.empty(layout.size, dtype=held.dtype)
    for slot in layout.slots:
        if slot.start < layout.decayed:
            slot.view(flat).copy_(held.rows(slot, torch.arange(slot.shape[0])))
        else:
            slot.view(flat).copy_(held.vector(slot.start, slot.count))
    return flat
