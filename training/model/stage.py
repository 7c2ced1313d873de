"""One stage of a Llama or Qwen2 model, computed from a flat vector of its weights.

`StageModel` holds no weights of its own: the same object runs the local weights of either version, and the
anchor for inference. Built from the spec and the stage's layers alone; the whole model never exists.
Weights for serving may be `Int8Weights` instead of the vector; nothing but an adapter learns beside those.
Shapes: tokens [B, T], hidden [B, T, width], logits [B, T, vocabulary]. What a position attends to is the
`Mixer`'s affair: in training all that came before it in its row, in serving what a cache holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as functional

from shoal.training.model.int8 import Int8Weights
from shoal.training.model.layout import EMBEDDING, FINAL_NORM, HEAD, StageLayout
from shoal.training.model.split import Tape, scale, shift
from shoal.training.spec import RunSpec


class Weight(Protocol):
    """A flat vector, as far as a model reads it; `devices.stage` has only a layer of it at a time."""

    def __getitem__(self, wanted: slice, /) -> torch.Tensor: ...


Held = torch.Tensor | Int8Weights  # a stage's weights
Read = Weight | Int8Weights  # and what a model computes with
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # inputs [..., n], weight [m, n] -> [..., m]
# (layer, query [B, heads, T, d], key [B, kv_heads, T, d], value like key, not rotated) -> mixed like query
Mixer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class StageModel:
    """The forward computation of one stage."""

    def __init__(self, spec: RunSpec, layout: StageLayout, product: Product = functional.linear) -> None:
        """`product` multiplies where there is no tape."""
        self.layout, self._plain = layout, product
        self._model = spec.model
        self._slots = {slot.name: slot for slot in layout.slots}
        self._head_name = EMBEDDING if spec.model.tie_embeddings else HEAD

    def embed(self, weights: Read, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden state of the first stage's input. tokens [B, T] -> [B, T, width]."""
        slot = self._slots[EMBEDDING]
        if isinstance(weights, Int8Weights):
            return weights.rows(slot, tokens)
        return functional.embedding(tokens, weights[slot.start : slot.start + slot.count].view(slot.shape))

    def blocks(
        self, weights: Read, hidden: torch.Tensor, tape: Tape | None, mixer: Mixer | None = None
    ) -> torch.Tensor:
        """The stage's layers. [B, T, width] -> [B, T, width]."""
        for layer in self.layout.layers:
            hidden = self.block(weights, layer, hidden, tape, mixer)
        return hidden

    def block(
        self, weights: Read, layer: int, hidden: torch.Tensor, tape: Tape | None, mixer: Mixer | None = None
    ) -> torch.Tensor:
        """One of them."""
        hidden = hidden + self._attention(weights, layer, hidden, tape, mixer or self._causal)
        return hidden + self._feedforward(weights, f"layers.{layer}", hidden, tape)

    def logits(self, weights: Read, hidden: torch.Tensor, tape: Tape | None) -> torch.Tensor:
        """The last stage's output. [B, T, width] -> [B, T, vocabulary]."""
        hidden = self._norm(weights, FINAL_NORM, hidden, tape)
        return self._product(weights, (self._head_name,), hidden, tape)

    def loss(
        self, weights: Read, hidden: torch.Tensor, targets: torch.Tensor, tape: Tape | None
    ) -> torch.Tensor:
        """Summed cross-entropy in nats over targets [B, T]; a scalar, fp32."""
        logits = self.logits(weights, hidden, tape).float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def _norm(self, weights: Read, name: str, hidden: torch.Tensor, tape: Tape | None) -> torch.Tensor:
        slot = self._slots[name]
        normal = functional.rms_norm(hidden, (self._model.width,), eps=self._model.norm_epsilon)
        return scale(normal, _vector(weights, slot.start, slot.count), slot.start, tape)

    def _product(
        self, weights: Read, names: tuple[str, ...], inputs: torch.Tensor, tape: Tape | None
    ) -> torch.Tensor:
        """One product for matrices that lie side by side in the flat vector."""
        slots = [self._slots[name] for name in names]
        rows = sum(slot.shape[0] for slot in slots)
        start, columns = slots[0].start, slots[0].shape[1]
        if isinstance(weights, Int8Weights):
            product = weights.linear(inputs, start, rows)
            return product if tape is None else tape.beside(product, inputs, start, rows * columns)
        weight = weights[start : start + rows * columns].view(rows, columns)
        return self._plain(inputs, weight) if tape is None else tape.linear(inputs, weight, start)

    def _attention(
        self, weights: Read, layer: int, hidden: torch.Tensor, tape: Tape | None, mixer: Mixer
    ) -> torch.Tensor:
        model, prefix = self._model, f"layers.{layer}"
        batch, length, width = hidden.shape
        head_size = width // model.heads
        inputs = self._norm(weights, f"{prefix}.attention_norm", hidden, tape)
        names = tuple(f"{prefix}.attention.{part}" for part in "qkv")
        projected = self._product(weights, names, inputs, tape)
        if model.qkv_bias:
            first = self._slots[f"{names[0]}_bias"]
            bias = _vector(weights, first.start, projected.shape[-1])
            projected = shift(projected, bias, first.start, tape)
        heads = projected.view(batch, length, -1, head_size).transpose(1, 2)
        query, key, value = torch.split(heads, [model.heads, model.kv_heads, model.kv_heads], dim=1)
        mixed = mixer(layer, query, key, value)
        flat = mixed.transpose(1, 2).reshape(batch, length, width)
        return self._product(weights, (f"{prefix}.attention.o",), flat, tape)

    def _causal(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Every position attends to itself and those before it."""
        length, head_size = query.shape[2:]
        cosine, sine = rotation(length, head_size, self._model.rope_theta, query.dtype, query.device)
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1]
        )

    def _feedforward(
        self, weights: Read, prefix: str, hidden: torch.Tensor, tape: Tape | None
    ) -> torch.Tensor:
        inputs = self._norm(weights, f"{prefix}.feedforward_norm", hidden, tape)
        names = (f"{prefix}.feedforward.gate", f"{prefix}.feedforward.up")
        gate, up = self._product(weights, names, inputs, tape).chunk(2, dim=-1)
        return self._product(weights, (f"{prefix}.feedforward.down",), functional.silu(gate) * up, tape)


def _vector(weights: Read, start: int, count: int) -> torch.Tensor:
    """Norm scales, or biases that lie side by side."""
    return (
        weights.vector(start, count) if isinstance(weights, Int8Weights) else weights[start : start + count]
    )


@functools.lru_cache(maxsize=8)
def rotation(
    length: int, head_size: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [T, head_size] of rotary embeddings (RoFormer, eq. 34; halves as in Llama)."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float64) / head_size
    angles = torch.outer(torch.arange(length, dtype=torch.float64), theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """heads [..., T, d] turned by their positions, cosine and sine [T, d]."""
    low, high = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-high, low), dim=-1) * sine
