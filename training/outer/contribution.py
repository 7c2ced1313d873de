"""Contribution: what one process offers a round, encoded. Made at PREPARE by `Member`, kept until COMMIT."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.compression.codec import Buffer, Codec, CodecError
from shoal.training.outer.context import Offload
from shoal.training.outer.local import Sent
from shoal.training.outer.parts import Fragment, Part
from shoal.training.outer.residuals import Residuals
from shoal.training.spec import CompressionSection

_GROUP_VALUES = 1 << 21  # of fp32 in one piece of off-loop work: a few milliseconds


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """q = C(a − s + e) of every part of a fragment, with what was taken for it."""

    fragment: Fragment
    codec: Codec
    anchor: torch.Tensor  # a [fragment] fp32 CPU
    sent: Sent  # s [fragment]
    carried: dict[int, torch.Tensor]  # e by part index, where there is one
    encoded: dict[int, Buffer]  # by part index
    norm: float  # ‖a − s + e‖; not finite where there is nothing to encode

    def remainder(self, part: Part, section: CompressionSection) -> torch.Tensor | None:
        """β·(a − s + e − decode(q)) [count]: what the entry that lists this part left out.

        None where nothing is fed back: what was carried has gone with this contribution.
        """
        if not (self.codec.needs_feedback and section.feedback) or part.index not in self.encoded:
            return None
        decoded = self.codec.decode(self.encoded[part.index], part.count)
        return self._delta(part).sub_(decoded).mul_(section.feedback_decay)

    def _delta(self, part: Part) -> torch.Tensor:
        within = self.fragment.within(part)
        delta = self.anchor[within] - self.sent.weights[within]
        carried = self.carried.get(part.index)
        return delta if carried is None else delta.add_(carried)

    def encode(self, parts: Sequence[Part]) -> tuple[dict[int, Buffer], float]:
        """Encoded parts and the square of their norm. Raises CodecError for values that are not finite."""
        encoded, square = {}, 0.0
        for part in parts:
            delta = self._delta(part)
            square += float(torch.linalg.vector_norm(delta)) ** 2
            encoded[part.index] = self.codec.encode(delta)
        return encoded, square


async def contribute(
    fragment: Fragment, codec: Codec, anchor: torch.Tensor, sent: Sent, residuals: Residuals, offload: Offload
) -> Contribution:
    """Encodes a whole fragment off the loop, in as many threads as `offload` has."""
    carried = {part.index: e for part in fragment.parts if (e := residuals.contributed(part)) is not None}
    empty = Contribution(fragment, codec, anchor, sent, carried, {}, math.nan)
    try:
        done = await asyncio.gather(*(offload(empty.encode, parts) for parts in grouped(fragment.parts)))
    except CodecError:
        return empty
    encoded = {index: data for piece, _ in done for index, data in piece.items()}
    norm = math.sqrt(sum(square for _, square in done))
    return Contribution(fragment, codec, anchor, sent, carried, encoded, norm)


def grouped(parts: Sequence[Part]) -> list[Sequence[Part]]:
    """Runs of parts of about _GROUP_VALUES values, each one piece of off-loop work."""
    each = max(1, _GROUP_VALUES // parts[0].count)
    return [parts[i : i + each] for i in range(0, len(parts), each)]
