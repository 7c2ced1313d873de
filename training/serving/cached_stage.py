"""Forward through one stage for many sessions at once, each with its own cache and at its own position.

Matrix products take the rows of all sessions together, attention goes session by session. A row's result is,
but for rounding, what the training model gives for the same prefix: it is the same code but for the `Mixer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from shoal.training.model.layout import StageLayout
from shoal.training.model.product import product
from shoal.training.model.stage import Held, StageModel, rotate, rotation
from shoal.training.serving.cache import Cache
from shoal.training.spec import RunSpec


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Consecutive positions of one session in a batch."""

    cache: Cache
    start: int
    count: int


class CachedStage:
    """One stage. Holds no weights and no sessions."""

    def __init__(self, spec: RunSpec, layout: StageLayout) -> None:
        self.layout, self.width = layout, spec.model.width
        self._spec = spec
        self._model = StageModel(spec, layout, product)

    def cache(self, weights: Held) -> Cache:
        """An empty one, of the weights' type and device."""
        return Cache(self._spec, self.layout.layers, weights.dtype, str(weights.device))

    @torch.no_grad()
    def forward(self, weights: Held, inputs: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """Hidden states [N, width] of the spans' positions, in their order; their caches hold them then.

        `inputs`: token ids int64 [N] at the first stage, else the stage before's hidden states [N, width].
        """
        inputs = inputs.to(weights.device)[None]
        first = self.layout.first
        hidden = self._model.embed(weights, inputs) if first else inputs.to(weights.dtype)
        return self._model.blocks(weights, hidden, None, _CachedMixer(self._spec, spans))[0]

    @torch.no_grad()
    def logits(self, weights: Held, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 [N, vocabulary] on the CPU, of hidden states [N, width] that the last stage gave."""
        return self._model.logits(weights, hidden[None], None)[0].float().cpu()


class _CachedMixer:
    """Attention of one batch: a position attends to what its session's cache holds, and to itself."""

    def __init__(self, spec: RunSpec, spans: Sequence[Span]) -> None:
        self._model = spec.model
        self._spans = spans
        stops = max(span.start + span.count for span in spans)
        self._table = 1 << (stops - 1).bit_length()  # few sizes, so that the table is computed rarely
        self._turns: tuple[torch.Tensor, torch.Tensor] | None = None  # of the positions, for all layers

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        if self._turns is None:
            self._turns = self._turns_of(query)
        cosine, sine = self._turns
        query, both = rotate(query, cosine, sine), torch.cat((rotate(key, cosine, sine), value))
        mixed, at = [], 0
        for span in self._spans:
            rows = slice(at, at + span.count)
            span.cache.write(layer, span.start, both[:, :, rows])
            mixed.append(self._attend(query[:, :, rows], span.cache.read(layer, span.start + span.count)))
            at += span.count
        return torch.cat(mixed, dim=2)

    def _turns_of(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the spans' positions."""
        whole = rotation(self._table, query.shape[-1], self._model.rope_theta, query.dtype, query.device)
        cosine, sine = (
            torch.cat([table[span.start : span.start + span.count] for span in self._spans])
            for table in whole
        )
        return cosine, sine

    def _attend(self, query: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
        """query [1, heads, n, d] of the last n positions of both [2, kv_heads, L, d]."""
        count, length = query.shape[2], both.shape[2]
        mask = None
        if count > 1:
            mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)
        return functional.scaled_dot_product_attention(
            query, both[:1], both[1:], attn_mask=mask, enable_gqa=both.shape[1] != query.shape[1]
        )
