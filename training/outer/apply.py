"""Applying an entry: the outer step of one fragment, and what local weights and residuals do about it.

A round steps each part as soon as it is held, while others are still on their way; COMMIT then finds most of
the work done, and does again what was decided otherwise. No tensor that others hold is changed. The new state
is hashed last, when local weights have moved: inner steps need not wait for that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3

from shoal.compression.codec import bytes_of
from shoal.training.outer.codecs import RoundCodecs
from shoal.training.outer.context import Context
from shoal.training.outer.contribution import Contribution, grouped
from shoal.training.outer.entry import SKIP, Entry
from shoal.training.outer.local import Rebase
from shoal.training.outer.parts import Fragment, Part
from shoal.training.outer.reduce import Published


@dataclass(frozen=True, slots=True, eq=False)
class Applied:
    """A fragment's agreed state after an entry, and what follows from it for this process."""

    anchor: torch.Tensor  # [fragment] fp32 CPU
    momentum: torch.Tensor
    changes: list[Rebase]
    remainders: dict[int, torch.Tensor | None]  # of e, by part index


class OuterStep:
    """One fragment on its way from one anchor to the next. Parts are counted from the fragment's first."""

    def __init__(
        self,
        context: Context,
        fragment: Fragment,
        codecs: RoundCodecs,
        anchor: torch.Tensor,
        momentum: torch.Tensor,
        digests: Sequence[bytes],  # of the parts' states before, if they are known
        scale: float | None = None,  # of a re-entry, which leaves the momentum alone
    ) -> None:
        self._context = context
        self._fragment = fragment
        self._codecs = codecs
        self._anchor = anchor
        self._momentum = momentum
        self._digests = digests
        self._scale = scale
        self._after = context.buffers.take(fragment.count)
        moves = context.strategy.momentum > 0.0 and scale is None
        self._velocity = context.buffers.take(fragment.count) if moves else momentum
        self._tasks: dict[int, asyncio.Future[None]] = {}  # by part
        self._taken: dict[int, bytes] = {}  # part -> digest of the mean that was taken
        self._settling = False

    def begin(self, number: int, published: Published) -> None:
        """Step a part that is held and will most likely be committed, off the loop."""
        if number not in self._tasks and not self._settling:
            self._start(number, published)

    def _start(self, number: int, published: Published | None) -> None:
        self._taken[number] = SKIP if published is None else published.digest
        self._tasks[number] = asyncio.ensure_future(self._context.offload(self._step, number, published))

    async def _settle(self, published: Mapping[int, Published]) -> None:
        """What an entry decided. What arrives from here on is too late: two must not write one part."""
        self._settling = True
        numbers = range(len(self._fragment.parts))
        decided = {n: published[n].digest if n in published else SKIP for n in numbers}
        if wrong := [n for n in self._tasks if self._taken[n] != decided[n]]:
            await asyncio.wait([self._tasks[n] for n in wrong])
        for n in numbers:
            if self._taken.get(n) != decided[n]:
                self._start(n, published.get(n))
        if under_way := [task for task in self._tasks.values() if not task.done()]:
            await asyncio.wait(under_way)
        for task in self._tasks.values():
            task.result()

    async def finish(
        self, entry: Entry, published: Mapping[int, Published], mine: Contribution | None
    ) -> Applied:
        """Whatever is left to do for an entry; `mine` is what this process contributed and it may list.

        Local weights and residuals, part by part (design section 9): listed, w ← new + (w − s) and e ← what
        was left out; not listed, w ← w + (new − a); SKIP, nothing.
        """
        await self._settle(published)
        seat = entry.seat_of(self._context.me, self._context.incarnation)
        changes: list[Rebase] = []
        remainders: dict[int, torch.Tensor | None] = {}
        for number, part in enumerate(self._fragment.parts):
            if number not in published:
                continue
            span = self._fragment.within(part)
            after = self._after[span]
            if mine is not None and seat is not None and entry.lists(number, seat):
                changes.append(
                    Rebase(part.start, mine.sent.weights[span], after, self._alpha(), mine.sent.moves)
                )
                remainders[part.index] = mine.remainder(part)
            else:
                changes.append(Rebase(part.start, self._anchor[span], after))
        return Applied(self._after, self._velocity, changes, remainders)

    async def digests(self) -> list[bytes]:
        """Of each part of the state after it, once that is finished."""
        groups = grouped(self._fragment.parts)
        found = await asyncio.gather(*(self._context.offload(self._hashed, group) for group in groups))
        return [digest for group in found for digest in group]

    def _hashed(self, parts: Sequence[Part]) -> list[bytes]:
        """What was not touched is not hashed again."""
        found = []
        for part in parts:
            span, number = self._fragment.within(part), part.index - self._fragment.parts[0].index
            known = self._digests[number] if self._digests else b""
            if known and self._taken[number] == SKIP:
                found.append(known)
            elif known and self._velocity is self._momentum:
                found.append(tensor_digest(self._after[span]) + known[PART_STATE_BYTES // 2 :])
            else:
                found.append(part_state(self._after[span], self._velocity[span]))
        return found

    async def close(self) -> None:
        """Wait for what is under way: it writes into buffers."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _step(self, number: int, published: Published | None) -> None:
        part, codec = self._fragment.parts[number], self._codecs.published(number)
        span = self._fragment.within(part)
        after, velocity = self._after[span], self._velocity[span]
        if published is None:
            after.copy_(self._anchor[span])
            if self._velocity is not self._momentum:
                velocity.copy_(self._momentum[span])
        elif self._scale is not None:
            self._context.strategy.reenter(codec, published.encoded, self._anchor[span], self._scale, after)
        else:
            anchor, momentum = self._anchor[span], self._momentum[span]
            self._context.strategy.step(codec, published.encoded, anchor, momentum, after, velocity)

    def _alpha(self) -> float | None:
        outer = self._context.spec.outer
        return outer.merge_alpha if outer.merge == "alpha" else None


PART_STATE_BYTES = 64


def part_state(anchor: torch.Tensor, momentum: torch.Tensor) -> bytes:
    """BLAKE3 of a part's anchor, then of its momentum: what the state root is made of."""
    return tensor_digest(anchor) + tensor_digest(momentum)


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """BLAKE3 over a flat tensor's bytes."""
    return blake3(b"shoal tensors\0").update(bytes_of(tensor)).digest()


def tensors_digest(parts: Sequence[bytes]) -> bytes:
    """Of a whole stage, from its parts': equal on replicas with equal heads (P1)."""
    return blake3(b"shoal parts\0" + b"".join(parts)).digest()
