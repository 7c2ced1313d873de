"""Applying an entry: the outer step of one fragment, and what local weights and residuals do about it.

Arithmetic only, run off the loop by `Replica`. New tensors come out, none is changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from blake3 import blake3

from shoal.compression.codec import Buffer, bytes_of
from shoal.compression.registry import codec_by_tag
from shoal.training.outer.context import Context
from shoal.training.outer.contribution import Contribution, grouped
from shoal.training.outer.entry import SKIP, Entry
from shoal.training.outer.local import Rebase
from shoal.training.outer.parts import Fragment, Part


@dataclass(slots=True, eq=False)
class Applied:
    """A fragment's agreed state after an entry, and what follows from it for this process."""

    anchor: torch.Tensor  # [fragment] fp32 CPU
    momentum: torch.Tensor
    changes: list[Rebase] = field(default_factory=list)
    remainders: dict[int, torch.Tensor | None] = field(default_factory=dict)  # of e, by part index
    digest: bytes = b""  # of both tensors


async def apply_entry(
    context: Context,
    fragment: Fragment,
    entry: Entry,
    published: Mapping[int, Buffer],
    anchor: torch.Tensor,
    momentum: torch.Tensor,
    mine: Contribution | None,
) -> Applied:
    """The outer step of an entry; anchor and momentum [fragment] fp32 stay as they are.

    Per part (design section 9), with `mine` what this process contributed and the entry may list:
    listed, w ← new + (w − s) and e ← what was left out; not listed, w ← w + (new − a); SKIP, nothing.
    """
    after = context.buffers.take(fragment.count)
    velocity = context.buffers.take(fragment.count) if context.strategy.momentum else momentum
    applied = Applied(after, velocity)
    work = _Work(context, fragment, entry, published, anchor, momentum, mine, applied)
    numbered = list(enumerate(fragment.parts))
    each = len(grouped(fragment.parts)[0])
    pieces = [numbered[i : i + each] for i in range(0, len(numbered), each)]
    for changes, remainders in await asyncio.gather(*(context.offload(work.step, piece) for piece in pieces)):
        applied.changes += changes
        applied.remainders |= remainders
    applied.digest = await context.offload(fragment_digest, after, velocity)
    return applied


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    context: Context
    fragment: Fragment
    entry: Entry
    published: Mapping[int, Buffer]  # by part, counted from the fragment's first
    anchor: torch.Tensor
    momentum: torch.Tensor
    mine: Contribution | None
    applied: Applied

    def step(self, parts: Sequence[tuple[int, Part]]) -> tuple[list[Rebase], dict[int, torch.Tensor | None]]:
        """Some parts of the fragment."""
        codec = codec_by_tag(self.entry.published)
        changes: list[Rebase] = []
        remainders: dict[int, torch.Tensor | None] = {}
        for number, part in parts:
            span = self.fragment.within(part)
            before, after = self.anchor[span], self.applied.anchor[span]
            if self.entry.digest(number) == SKIP:
                after.copy_(before)
                if self.applied.momentum is not self.momentum:
                    self.applied.momentum[span].copy_(self.momentum[span])
                continue
            mean = codec.decode(self.published[number], part.count)
            velocity = self.applied.momentum[span]
            self.context.strategy.step(before, self.momentum[span], mean, after, velocity)
            if self.mine is not None and self._lists_me(number):
                changes.append(Rebase(part.start, self.mine.sent.weights[span], after, self._alpha()))
                remainders[part.index] = self.mine.remainder(part, self.context.spec.compression)
            else:
                changes.append(Rebase(part.start, before, after))
        return changes, remainders

    def _lists_me(self, number: int) -> bool:
        seat = self.entry.seat_of(self.context.me, self.context.incarnation)
        return seat is not None and bool(self.entry.listed_in(number)[seat // 8] >> seat % 8 & 1)

    def _alpha(self) -> float | None:
        outer = self.context.spec.outer
        return outer.merge_alpha if outer.merge == "alpha" else None


def fragment_digest(anchor: torch.Tensor, momentum: torch.Tensor) -> bytes:
    """BLAKE3 over the bytes of a fragment's anchor, then its momentum."""
    hasher = blake3(b"shoal tensors\0")
    for tensor in (anchor, momentum):
        hasher.update(bytes_of(tensor))
    return hasher.digest()


def tensors_digest(fragments: Sequence[bytes]) -> bytes:
    """Of a whole stage, from its fragments': equal on replicas with equal heads (P1)."""
    return blake3(b"shoal fragments\0" + b"".join(fragments)).digest()
