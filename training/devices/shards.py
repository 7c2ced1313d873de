"""Which values of a stage's flat vector lie on which device, and how they get there and back.

The vector is cut into spans: what lies together of one layer (of the embedding, of the head). A span is
sharded as FSDP2 shards a parameter of one dimension, by `Shard(0)`; a rank's shards, one after another, are
its own small flat vector, on which optimizers work as they do on a whole one. Nothing here ever makes the
whole vector on a device: a span at a time is the most that is in one place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from shoal.training.devices.ranks import Ranks
from shoal.training.model.layout import EMBEDDING, FINAL_NORM, HEAD, StageLayout

FIRST, LAST = "first", "last"  # the parts at a model's ends


@dataclass(frozen=True, slots=True)
class Span:
    """Values start..stop of the flat vector; this rank's shard of them is at..end of its own."""

    part: str  # what is gathered together: a layer, or an end
    start: int
    stop: int
    at: int
    end: int

    @property
    def count(self) -> int:
        return self.stop - self.start


class Shards:
    """See the module. `spans` in the order of both vectors."""

    def __init__(self, layout: StageLayout, ranks: Ranks) -> None:
        self.ranks = ranks
        self.spans: list[Span] = []
        self.size = self.decayed = 0  # of this rank's vector
        for part, start, stop in _runs(layout):
            shard = -(-(stop - start) // ranks.count)  # as torch.chunk, and so FSDP, cuts it
            mine = max(0, min(shard, stop - start - ranks.rank * shard))
            self.spans.append(Span(part, start, stop, self.size, self.size + mine))
            self.size += mine
            if stop <= layout.decayed:
                self.decayed = self.size

    def gather(self, span: Span, own: torch.Tensor) -> torch.Tensor:
        """The whole span [count] on every rank, of everybody's vectors."""
        piece = own[span.at : span.end].to(self.ranks.device)
        return DTensor.from_local(
            piece, self.ranks.mesh, [Shard(0)], run_check=False, shape=torch.Size((span.count,)), stride=(1,)
        ).full_tensor()

    def scatter(self, span: Span, whole: torch.Tensor | None, own: torch.Tensor) -> None:
        """Rank 0's whole span [count] into everybody's vectors."""
        if whole is None:
            whole = own.new_empty(span.count, device=self.ranks.device)
        pieces = distribute_tensor(whole.to(self.ranks.device), self.ranks.mesh, [Shard(0)])
        own[span.at : span.end].copy_(pieces.to_local())

    def reduce(self, span: Span, partial: torch.Tensor, own: torch.Tensor) -> None:
        """Add the sum over all ranks of `partial` [count] to everybody's vectors."""
        pieces = DTensor.from_local(partial, self.ranks.mesh, [Partial()], run_check=False)
        own[span.at : span.end].add_(pieces.redistribute(placements=[Shard(0)]).to_local())

    def dealt(self, whole: torch.Tensor | None) -> torch.Tensor:
        """This rank's vector of rank 0's whole one [size of the stage] fp32."""
        own = torch.empty(self.size, device=self.ranks.device)
        for span in self.spans:
            self.scatter(span, None if whole is None else whole[span.start : span.stop], own)
        return own

    def whole(self, own: torch.Tensor) -> torch.Tensor:
        """On rank 0 the stage's whole vector, fp32 CPU; empty elsewhere."""
        found = torch.empty(self.spans[-1].stop if self.ranks.first else 0)
        for span in self.spans:
            gathered = self.gather(span, own)
            if self.ranks.first:
                found[span.start : span.stop] = gathered
        return found

    def within(self, start: int, stop: int) -> Iterator[tuple[Span, slice, slice]]:
        """Spans that overlap start..stop, the overlap within the span, and within start..stop."""
        for span in self.spans:
            begin, end = max(start, span.start), min(stop, span.stop)
            if begin < end:
                yield span, slice(begin - span.start, end - span.start), slice(begin - start, end - start)


def last_part(layout: StageLayout) -> str:
    """That of head and final norm; with tied embeddings the head is the embedding."""
    return LAST if any(slot.name == HEAD for slot in layout.slots) else FIRST


def _runs(layout: StageLayout) -> list[tuple[str, int, int]]:
    """(part, start, stop) of slots that lie together, belong together, and are decayed or are not."""
    runs: list[tuple[str, int, int]] = []
    for slot in layout.slots:
        if slot.name == EMBEDDING:
            part = FIRST
        else:
            part = last_part(layout) if slot.name in (HEAD, FINAL_NORM) else slot.name.split(".")[1]
        if runs and runs[-1][0] == part and slot.start != layout.decayed:
            part, start, _ = runs.pop()
        else:
            start = slot.start
        runs.append((part, start, slot.start + slot.count))
    return runs
