"""A plain Llama (or Qwen2) of torch modules, whole, with autograd's own backward.

Stages are compared with it by the model's parity tests and by the pipeline benchmark. Parameter names match
`model.layout`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as functional
from torch import nn

from shoal.training.model.layout import Slot, StageLayout
from shoal.training.spec import RunSpec


class Block(nn.Module):
    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        model = spec.model
        self.model = model
        self.head_size = model.width // model.heads
        key_width = model.kv_heads * self.head_size
        self.attention_norm = nn.RMSNorm(model.width, eps=model.norm_epsilon)
        self.feedforward_norm = nn.RMSNorm(model.width, eps=model.norm_epsilon)
        self.attention = nn.ModuleDict(
            {
                "q": nn.Linear(model.width, model.width, bias=model.qkv_bias),
                "k": nn.Linear(model.width, key_width, bias=model.qkv_bias),
                "v": nn.Linear(model.width, key_width, bias=model.qkv_bias),
                "o": nn.Linear(model.width, model.width, bias=False),
            }
        )
        self.feedforward = nn.ModuleDict(
            {
                "gate": nn.Linear(model.width, model.feedforward, bias=False),
                "up": nn.Linear(model.width, model.feedforward, bias=False),
                "down": nn.Linear(model.feedforward, model.width, bias=False),
            }
        )
        frequencies = model.rope_theta ** -(torch.arange(0, self.head_size, 2).double() / self.head_size)
        angles = torch.outer(torch.arange(model.sequence).double(), frequencies).float()
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def rotate(self, heads: torch.Tensor) -> torch.Tensor:
        length = heads.shape[2]
        cosine, sine = self.get_buffer("cosine")[:length], self.get_buffer("sine")[:length]
        low, high = heads.chunk(2, dim=-1)
        return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)

    def heads(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        batch, length, _ = inputs.shape
        projected: torch.Tensor = self.attention[name](inputs)
        return projected.view(batch, length, -1, self.head_size).transpose(1, 2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, length, width = hidden.shape
        inputs = self.attention_norm(hidden)
        mixed = functional.scaled_dot_product_attention(
            self.rotate(self.heads("q", inputs)),
            self.rotate(self.heads("k", inputs)),
            self.heads("v", inputs),
            is_causal=True,
            enable_gqa=self.model.kv_heads != self.model.heads,
        )
        hidden = hidden + self.attention["o"](mixed.transpose(1, 2).reshape(batch, length, width))
        inputs = self.feedforward_norm(hidden)
        feedforward = self.feedforward
        activated = functional.silu(feedforward["gate"](inputs)) * feedforward["up"](inputs)
        hidden = hidden + feedforward["down"](activated)
        return hidden


class Reference(nn.Module):
    """The layers `layers` of the model, with embedding and head where they belong."""

    def __init__(self, spec: RunSpec, layers: range | None = None) -> None:
        super().__init__()
        model, vocabulary = spec.model, spec.data.vocabulary
        layers = layers if layers is not None else range(model.layers)
        self.embedding = nn.Embedding(vocabulary, model.width) if layers.start == 0 else None
        self.layers = nn.ModuleDict({str(layer): Block(spec) for layer in layers})
        last = layers.stop == model.layers
        self.final_norm = nn.RMSNorm(model.width, eps=model.norm_epsilon) if last else None
        self.head = nn.Linear(model.width, vocabulary, bias=False) if last else None
        if last and model.tie_embeddings and self.head is not None and self.embedding is not None:
            self.head.weight = self.embedding.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(inputs) if self.embedding is not None else inputs
        for block in self.layers.values():
            hidden = block(hidden)
        if self.final_norm is not None and self.head is not None:
            hidden = self.head(self.final_norm(hidden))
        return hidden

    def load(self, stages: Iterable[tuple[StageLayout, torch.Tensor]]) -> None:
        """Take the weights of flat stage vectors."""
        own = dict(self.named_parameters())
        with torch.no_grad():
            for layout, flat in stages:
                for slot in layout.slots:
                    own[_theirs(slot)].copy_(slot.view(flat))

    def gradients(self, layout: StageLayout) -> torch.Tensor:
        """This model's gradients in the order of a stage's flat vector."""
        own = dict(self.named_parameters())
        flat = torch.zeros(layout.size)
        for slot in layout.slots:
            gradient = own[_theirs(slot)].grad
            if gradient is not None:
                slot.view(flat).copy_(gradient)
        return flat

    def weights(self, layout: StageLayout) -> torch.Tensor:
        """This model's weights in the order of a stage's flat vector."""
        own = dict(self.named_parameters())
        flat = torch.zeros(layout.size)
        for slot in layout.slots:
            slot.view(flat).copy_(own[_theirs(slot)].detach())
        return flat


def _theirs(slot: Slot) -> str:
    """torch's name of a parameter."""
    return f"{slot.name.removesuffix('_bias')}.{'bias' if slot.name.endswith('_bias') else 'weight'}"


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over tokens."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
