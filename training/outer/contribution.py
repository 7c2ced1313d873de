"""Contribution: what one process offers a round, encoded. Made at PREPARE by `Member`, kept until COMMIT."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.compression.choice import Choice
from shoal.compression.codec import Buffer, CodecError
from shoal.training.outer.codecs import LAYERS, RoundCodecs, measure, mix_of, sample
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
    codecs: RoundCodecs
    anchor: torch.Tensor  # a [fragment] fp32 CPU
    sent: Sent  # s [fragment]
    encoded: dict[int, Buffer]  # q by part index
    remainders: dict[int, torch.Tensor]  # β·(a − s + e − decode(q)) by part index, where it is fed back
    norm: float  # ‖a − s + e‖; not finite where there is nothing to encode
    mix: bytes = b""  # what the next round of this fragment might take (`codecs.mix_of`), where parts choose
    residual_norm: float = 0.0  # of the remainders

    def figures(self) -> dict[str, float]:
        """What the round's event says of it."""
        sent_bytes = sum(memoryview(data).nbytes for data in self.encoded.values())
        return {
            "bits_per_value": 8.0 * sent_bytes / self.fragment.count,
            "update_norm": self.norm,
            "residual_norm": self.residual_norm,
        }

    def remainder(self, part: Part) -> torch.Tensor | None:
        """What the entry that lists this part left out, [count].

        None where nothing is fed back: what was carried has gone with this contribution.
        """
        return self.remainders.get(part.index)


async def contribute(
    fragment: Fragment,
    codecs: RoundCodecs,
    section: CompressionSection,
    anchor: torch.Tensor,
    sent: Sent,
    residuals: Residuals,
    offload: Offload,
) -> Contribution:
    """Encodes a whole fragment off the loop, in as many threads as `offload` has."""
    encoded: dict[int, Buffer] = {}
    remainders: dict[int, torch.Tensor] = {}
    measured: dict[int, list[Choice]] = {}
    first = fragment.parts[0].index

    def encode(parts: Sequence[Part]) -> tuple[float, float]:
        square = left_square = 0.0
        for part in parts:
            span, codec = fragment.within(part), codecs.contribution(part.index - first)
            left = torch.empty(part.count) if codec.needs_feedback and section.feedback else None
            encoded[part.index], here, lost = codec.encode_difference(
                anchor[span],
                sent.weights[span],
                residuals.contributed(part),
                left,
                section.feedback_decay,
            )
            square += here
            left_square += lost
            if left is not None:
                remainders[part.index] = left
            if section.contribution == LAYERS:
                delta = sample(anchor[span]) - sample(sent.weights[span])
                if (carried := residuals.contributed(part)) is not None:
                    delta += sample(carried)
                measured[part.index] = measure(section, delta, part.count)
        return square, left_square

    try:
        squares = await asyncio.gather(*(offload(encode, p) for p in grouped(fragment.parts)))
    except CodecError:
        return Contribution(fragment, codecs, anchor, sent, {}, {}, math.nan)
    norm, residual_norm = (math.sqrt(sum(column)) for column in zip(*squares, strict=True))
    mix = await offload(mix_of, [measured[part.index] for part in fragment.parts]) if measured else b""
    return Contribution(fragment, codecs, anchor, sent, encoded, remainders, norm, mix, residual_norm)


def grouped(parts: Sequence[Part]) -> list[Sequence[Part]]:
    """Runs of parts of about _GROUP_VALUES values, each one piece of off-loop work."""
    each = max(1, _GROUP_VALUES // parts[0].count)
    return [parts[i : i + each] for i in range(0, len(parts), each)]
