"""Where each parameter of a stage lies in its one flat fp32 vector, and what it holds at genesis.

Everything that treats weights as numbers (optimizers, rounds, snapshots) works on the flat vector; the model
works on views of it. Order: matrices first, then norm scales and biases, so that weight decay is one slice;
projections that read the same input (q, k, v and gate, up) lie side by side, as do their biases, so that one
matrix product serves them.
Names are global (`layers.7.attention.q`): a checkpoint of two stages loads into four.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from blake3 import blake3

from shoal.training.spec import RunSpec

EMBEDDING = "embedding"
HEAD = "head"
FINAL_NORM = "final_norm"
_STANDARD_DEVIATION = 0.02  # GPT-2's and Llama's; outputs of residual branches: divided by sqrt(2·layers)


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter: its global name, shape, and first position in the flat vector."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.start : self.start + self.count].view(self.shape)


@dataclass(frozen=True, slots=True)
class StageLayout:
    """All parameters of one stage. `decayed`: values before the norm scales and biases."""

    layers: range
    first: bool
    last: bool
    slots: tuple[Slot, ...]
    size: int
    decayed: int


def stage_layout(spec: RunSpec, layers: range) -> StageLayout:
    """The layout of the stage that holds `layers` (with embedding or head where it is an end)."""
    model, vocabulary = spec.model, spec.data.vocabulary
    first, last = layers.start == 0, layers.stop == model.layers
    head_size = model.width // model.heads
    key_width = model.kv_heads * head_size
    matrices: list[tuple[str, tuple[int, ...]]] = []
    if first:
        matrices.append((EMBEDDING, (vocabulary, model.width)))
    for layer in layers:
        prefix = f"layers.{layer}"
        matrices += [
            (f"{prefix}.attention.q", (model.width, model.width)),
            (f"{prefix}.attention.k", (key_width, model.width)),
            (f"{prefix}.attention.v", (key_width, model.width)),
            (f"{prefix}.attention.o", (model.width, model.width)),
            (f"{prefix}.feedforward.gate", (model.feedforward, model.width)),
            (f"{prefix}.feedforward.up", (model.feedforward, model.width)),
            (f"{prefix}.feedforward.down", (model.width, model.feedforward)),
        ]
    if last and not model.tie_embeddings:
        matrices.append((HEAD, (vocabulary, model.width)))
    vectors = [
        (f"layers.{n}.{part}_norm", (model.width,)) for n in layers for part in ("attention", "feedforward")
    ]
    if last:
        vectors.append((FINAL_NORM, (model.width,)))
    if model.qkv_bias:
        widths = {"q": model.width, "k": key_width, "v": key_width}
        vectors += [(f"layers.{n}.attention.{part}_bias", (widths[part],)) for n in layers for part in widths]
    slots: list[Slot] = []
    start = 0
    for name, shape in (*matrices, *vectors):
        slots.append(Slot(name, shape, start))
        start += math.prod(shape)
    decayed = sum(math.prod(shape) for _, shape in matrices)
    return StageLayout(layers, first, last, tuple(slots), start, decayed)


def genesis(spec: RunSpec, layout: StageLayout) -> torch.Tensor:
    """Initial weights [layout.size] fp32: a function of the seed and each parameter's name alone.

    Uniform with the usual standard deviation, from PCG64 by integer arithmetic and one rounding, so that
    every machine draws the same bits whatever its vector unit (normal deviates go through libm).
    """
    flat = torch.empty(layout.size)
    for slot in layout.slots:
        slot.view(flat).copy_(first_values(spec, slot))
    return flat


def first_values(spec: RunSpec, slot: Slot) -> torch.Tensor:
    """Of one parameter, of its shape."""
    if slot.name.endswith("norm"):
        return torch.ones(slot.shape)
    if slot.name.endswith("bias"):
        return torch.zeros(slot.shape)
    deviation = _STANDARD_DEVIATION
    if slot.name.endswith((".o", ".down")):
        deviation /= math.sqrt(2 * spec.model.layers)
    seed = blake3(f"{spec.run.seed}/{slot.name}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "big")))
    values = generator.random(slot.count, dtype=np.float32)
    values -= np.float32(0.5)
    values *= np.float32(deviation * math.sqrt(12.0))
    return torch.from_numpy(values).view(slot.shape)
