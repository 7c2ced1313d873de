"""A stage whose weights lie in shards on several devices, gathered layer by layer while it computes (FSDP2).

`fully_shard` (torch) keeps the shards, gathers a part before its forward and again before its backward, ahead
of time where it can, and lets go of it afterwards. It does so beneath the backward in two halves (`split`):
its hooks hang on what goes in and out of a part, and the input gradient passes there. Of weight gradients it
hears nothing, for no parameter requires one: they are the tape's, and `weights.ShardWeights.add` sums each
span over the ranks when the micro-batch is committed. Tried before it was built: torch 2.13, CPU and gloo,
two micro-batches in flight at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from shoal.training.devices.shards import FIRST, Shards, last_part
from shoal.training.model.split import Tape
from shoal.training.model.stage import Mixer, StageModel, Weight


class _Part(nn.Module):
    """Spans that are gathered together. Indexed like the flat vector they are from."""

    def __init__(self, shards: Shards, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.spans = [span for span in shards.spans if span.part == name]
        self.values = nn.ParameterList(
            nn.Parameter(torch.empty(span.count, dtype=dtype, device="meta"), requires_grad=False)
            for span in self.spans
        )

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """`compute(self, ...)` while the weights are here."""
        return compute(self, *arguments)

    def __getitem__(self, wanted: slice) -> torch.Tensor:
        for span, values in zip(self.spans, self.values, strict=True):
            if span.start <= wanted.start and wanted.stop <= span.stop:
                found: torch.Tensor = values[wanted.start - span.start : wanted.stop - span.start]
                return found
        raise IndexError(f"{wanted} is not of this part")


class ShardedStage(nn.Module):
    """One version of the compute weights: what `Version.flat` is on a single device."""

    def __init__(self, shards: Shards, dtype: torch.dtype) -> None:
        super().__init__()
        names = dict.fromkeys(span.part for span in shards.spans)
        parts = {name: _Part(shards, name, dtype) for name in names}
        self.parts = nn.ModuleDict(parts)
        for part in parts.values():
            fully_shard(part, mesh=shards.ranks.mesh)
        fully_shard(self, mesh=shards.ranks.mesh)
        self.to_empty(device=shards.ranks.device)

    def forward(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """`compute(parts, ...)`, as one pass in whose order parts are gathered again for its backward."""
        return compute(self.parts, *arguments)

    @torch.no_grad()
    def copy_(self, own: torch.Tensor) -> None:
        """Take this rank's values from its flat vector, in this version's type."""
        for part in self.parts.values():
            held: Any = part
            for span, values in zip(held.spans, held.values, strict=True):
                values.to_local().copy_(own[span.at : span.end])


class ShardedModel(StageModel):
    """`StageModel` on a `ShardedStage`."""

    def embed(self, weights: Any, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = weights(self._embedded, tokens)
        return found

    def blocks(
        self, weights: Any, hidden: torch.Tensor, tape: Tape | None, mixer: Mixer | None = None
    ) -> torch.Tensor:
        found: torch.Tensor = weights(self._through, hidden, tape, mixer)
        return found

    def loss(
        self, weights: Any, hidden: torch.Tensor, targets: torch.Tensor, tape: Tape | None
    ) -> torch.Tensor:
        found: torch.Tensor = weights(self._scored, hidden, targets, tape)
        return found

    def _embedded(self, parts: nn.ModuleDict, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = parts[FIRST](super().embed, tokens)
        return found

    def _through(
        self, parts: nn.ModuleDict, hidden: torch.Tensor, tape: Tape | None, mixer: Mixer | None
    ) -> torch.Tensor:
        for layer in self.layout.layers:
            hidden = parts[str(layer)](self._block, hidden, layer, tape, mixer)
        return hidden

    def _block(
        self, weights: Weight, hidden: torch.Tensor, layer: int, tape: Tape | None, mixer: Mixer | None
    ) -> torch.Tensor:
        return self.block(weights, layer, hidden, tape, mixer)

    def _scored(
        self, parts: nn.ModuleDict, hidden: torch.Tensor, targets: torch.Tensor, tape: Tape | None
    ) -> torch.Tensor:
        found: torch.Tensor = parts[last_part(self.layout)](super().loss, hidden, targets, tape)
        return found
