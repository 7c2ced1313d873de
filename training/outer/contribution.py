"""Contribution: what a process offers a round. Taken at PREPARE by `Member`, encoded while `Round` sends it.

PREPARE is answered once its norm is known, and parts go out one by one as they are encoded: else the link
would be idle for as long as the whole fragment takes. Codecs that encode in the pass that copies and measures
have done so by then: less than that link would wait for a second one, and than memory for its traffic.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from shoal.compression.choice import Choice
from shoal.compression.codec import Buffer, CodecError
from shoal.compression.copying import take
from shoal.training.outer.change import Change
from shoal.training.outer.codecs import LAYERS, RoundCodecs, measure, mix_of, sample
from shoal.training.outer.context import Context
from shoal.training.outer.local import LocalWeights, Sent
from shoal.training.outer.parts import Fragment, Part

_GROUP_VALUES = 1 << 21  # of fp32 in one piece of off-loop work: a few milliseconds
_AT_ONCE = 2  # pieces under way, as many as the daemon has threads: others' work off the loop gets its turns


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A part, as a thread made it."""

    part: Part
    data: Buffer
    left: torch.Tensor | None
    left_square: float
    measured: list[Choice]


@dataclass(slots=True, eq=False)
class Contribution:
    """q = C(a − s + e) of every part of a fragment, with what was taken for it."""

    fragment: Fragment
    codecs: RoundCodecs
    anchor: torch.Tensor  # a [fragment] fp32 CPU
    sent: Sent  # s [fragment]
    carried: dict[int, torch.Tensor]  # e by part index, until all is encoded
    norm: float  # ‖a − s + e‖; not finite where there is nothing to encode
    order: Sequence[int] = ()  # of the fragment's parts, in which they are encoded and sent
    mix: bytes = b""  # what the next round of this fragment might take (`codecs.mix_of`), where parts choose
    _encoded: dict[int, Buffer] = field(default_factory=dict)  # q by part index
    _remainders: dict[int, torch.Tensor] = field(default_factory=dict)  # β·(a − s + e − decode(q))
    _left_square: float = 0.0  # of the remainders
    ended: bool = False  # all is encoded that will be
    _change: Change = field(default_factory=Change)

    @classmethod
    async def take(
        cls,
        context: Context,
        local: LocalWeights,
        fragment: Fragment,
        codecs: RoundCodecs,
        anchor: torch.Tensor,
        carried: dict[int, torch.Tensor],
    ) -> Contribution:
        """What there is now. Its norm is found as local weights are copied; so are its bytes if possible."""
        squares: list[float] = []
        encoded: dict[int, Buffer] = {}
        measures = context.spec.compression.contribution == LAYERS

        def copied(weights: torch.Tensor) -> torch.Tensor:
            into = context.buffers.take(fragment.count)
            for place, part in enumerate(fragment.parts):
                span, plus = fragment.within(part), carried.get(part.index)
                vectors = weights[span], into[span], anchor[span], plus
                taken = None if measures else codecs.contribution(place).take(*vectors)
                if taken is None:
                    squares.append(take(*vectors))
                else:
                    squares.append(taken[0])
                    encoded[part.index] = taken[1]
            return into

        sent = await local.sent(fragment.span, copied)
        return cls(fragment, codecs, anchor, sent, carried, math.sqrt(sum(squares)), _encoded=encoded)

    async def encode(self, context: Context) -> None:
        """Encode all parts, in `order`, off the loop. The run's owner is told of those that cannot be."""
        measured: dict[int, list[Choice]] = {}
        parts = [self.fragment.parts[number] for number in self.order]
        groups = iter(grouped([part for part in parts if part.index not in self._encoded]))
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(_AT_ONCE):
                    tasks.create_task(self._encode_all(context, groups, measured))
            if len(measured) == len(self.fragment.parts):
                in_order = [measured[part.index] for part in self.fragment.parts]
                self.mix = await context.offload(mix_of, in_order)
        finally:
            self.carried, self.ended = {}, True
            self._change.notify()

    async def encoded(self, part: Part) -> Buffer | None:
        """The bytes of a part, as soon as they are there; None where there will be none."""
        await self._change.until(lambda: self.ended or part.index in self._encoded, lambda: None)
        return self._encoded.get(part.index)

    def taken(self) -> Contribution:
        """What was taken, without what it was encoded to: for as long as a fork may matter."""
        return Contribution(self.fragment, self.codecs, self.anchor, self.sent, {}, self.norm)

    def remainder(self, part: Part) -> torch.Tensor | None:
        """What the entry that lists this part left out, [count].

        None where nothing is fed back: what was carried has gone with this contribution.
        """
        return self._remainders.get(part.index)

    def figures(self) -> dict[str, float]:
        """What the round's event says of it."""
        sent_bytes = sum(memoryview(data).nbytes for data in self._encoded.values())
        values = sum(part.count for part in self.fragment.parts if part.index in self._encoded)
        return {
            "bits_per_value": 8.0 * sent_bytes / max(values, 1),
            "update_norm": self.norm,
            "residual_norm": math.sqrt(self._left_square),
        }

    async def _encode_all(
        self, context: Context, groups: Iterator[Sequence[Part]], measured: dict[int, list[Choice]]
    ) -> None:
        for parts in groups:
            try:
                found: list[_Encoded] = await context.offload(self._encode, context, parts)
            except (CodecError, MemoryError, RuntimeError) as error:  # the last is torch's for no memory
                # These are not listed then, so nothing is lost.
                context.event("parts-not-encoded", {"first": parts[0].index, "why": str(error)})
                continue
            for made in found:
                index = made.part.index
                self._encoded[index] = made.data
                if made.left is not None:
                    self._remainders[index] = made.left
                    self._left_square += made.left_square
                if made.measured:
                    measured[index] = made.measured
            self._change.notify()

    def _encode(self, context: Context, parts: Sequence[Part]) -> list[_Encoded]:
        section, first = context.spec.compression, self.fragment.parts[0].index
        found = []
        for part in parts:
            span, codec = self.fragment.within(part), self.codecs.contribution(part.index - first)
            anchor, sent, carried = self.anchor[span], self.sent.weights[span], self.carried.get(part.index)
            feeds_back = codec.needs_feedback and section.feedback
            left = context.buffers.take(part.count) if feeds_back else None
            data, square = codec.encode_difference(anchor, sent, carried, left, section.feedback_decay)
            measured = []
            if section.contribution == LAYERS:
                delta = sample(anchor) - sample(sent)
                measured = measure(section, delta if carried is None else delta + sample(carried), part.count)
            found.append(_Encoded(part, data, left, square, measured))
        return found


def grouped(parts: Sequence[Part]) -> list[Sequence[Part]]:
    """Runs of parts of about _GROUP_VALUES values, each one piece of off-loop work."""
    each = max(1, _GROUP_VALUES // parts[0].count) if parts else 1
    return [parts[i : i + each] for i in range(0, len(parts), each)]
