"""Contribution: what one process offers a round. Made at PREPARE by `Member`, kept until COMMIT.

Its parts are encoded before the answer to PREPARE, which tells their norm; or on a slow link, where the
answer should not wait for that, each when `Round` sends it: then the norm takes a pass of its own.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from shoal.compression.choice import Choice
from shoal.compression.codec import Buffer, CodecError
from shoal.compression.difference import squared_norm
from shoal.training.outer.codecs import LAYERS, RoundCodecs, measure, mix_of, sample
from shoal.training.outer.context import Offload
from shoal.training.outer.local import Sent
from shoal.training.outer.parts import Fragment, Part
from shoal.training.outer.residuals import Residuals
from shoal.training.spec import CompressionSection

_GROUP_VALUES = 1 << 21  # of fp32 in one piece of off-loop work: a few milliseconds
# A core encodes 1 bit at 100 MB/s, more bits faster: a faster link waits for the encoder whenever it begins.
SLOW_LINK_BYTES_PER_S = 100e6


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """q = C(a − s + e) of every part of a fragment, with what was taken for it. Keys are indices of parts."""

    fragment: Fragment
    codecs: RoundCodecs
    section: CompressionSection
    anchor: torch.Tensor  # a [fragment] fp32 CPU
    sent: Sent  # s [fragment]
    carried: dict[int, torch.Tensor | None]  # e
    offload: Offload
    norm: float = math.nan  # ‖a − s + e‖; not finite where there is nothing to encode
    mix: bytes = b""  # what the next round of this fragment might take (`codecs.mix_of`), where parts choose
    encoded: dict[int, Buffer] = field(default_factory=dict)  # q, as far as they are
    remainders: dict[int, torch.Tensor] = field(
        default_factory=dict
    )  # β·(a − s + e − decode(q)), if fed back
    lost: dict[int, float] = field(default_factory=dict)  # their squared norms

    def figures(self) -> dict[str, float]:
        """What the round's event says of it."""
        sent_bytes = sum(memoryview(data).nbytes for data in self.encoded.values())
        return {
            "bits_per_value": 8.0 * sent_bytes / self.fragment.count,
            "update_norm": self.norm,
            "residual_norm": math.sqrt(sum(self.lost.values())),
        }

    async def part(self, part: Part) -> Buffer:
        """q of one part, encoded off the loop unless it is already. Raises CodecError."""
        if part.index not in self.encoded:
            await self.offload(self.encode, part)
        return self.encoded[part.index]

    def encode(self, part: Part) -> float:
        """Encode a part; ‖a − s + e‖² of it. Twice gives the same bits. Raises CodecError."""
        span, codec = self.fragment.within(part), self.codecs.contribution(part.index - self._first)
        left = torch.empty(part.count) if codec.needs_feedback and self.section.feedback else None
        encoded, square, lost = codec.encode_difference(
            self.anchor[span],
            self.sent.weights[span],
            self.carried[part.index],
            left,
            self.section.feedback_decay,
        )
        if left is not None:
            self.remainders[part.index], self.lost[part.index] = left, lost
        self.encoded[part.index] = encoded
        return square

    def square(self, part: Part) -> float:
        """‖a − s + e‖² of a part that is not encoded yet; not finite where its values are not."""
        span = self.fragment.within(part)
        return squared_norm(self.anchor[span], self.sent.weights[span], self.carried[part.index])

    def choices(self, part: Part) -> list[Choice]:
        """What each code of a mix would cost this part."""
        span, carried = self.fragment.within(part), self.carried[part.index]
        delta = sample(self.anchor[span]) - sample(self.sent.weights[span])
        if carried is not None:
            delta += sample(carried)
        return measure(self.section, delta, part.count)

    def remainder(self, part: Part) -> torch.Tensor | None:
        """What the entry that lists this part left out, [count].

        None where nothing is fed back: what was carried has gone with this contribution.
        """
        return self.remainders.get(part.index)

    @property
    def _first(self) -> int:
        return self.fragment.parts[0].index


async def contribute(
    fragment: Fragment,
    codecs: RoundCodecs,
    section: CompressionSection,
    anchor: torch.Tensor,
    sent: Sent,
    residuals: Residuals,
    offload: Offload,
    uplink_bytes_per_s: float,
) -> Contribution:
    """A whole fragment, off the loop in as many threads as `offload` has.

    It is encoded at once, unless the uplink is known (above 1) to be slow.
    """
    carried = {part.index: residuals.contributed(part) for part in fragment.parts}
    made = Contribution(fragment, codecs, section, anchor, sent, carried, offload)
    of_a_part = made.square if 1.0 < uplink_bytes_per_s < SLOW_LINK_BYTES_PER_S else made.encode

    def work(parts: Sequence[Part]) -> tuple[float, list[list[Choice]]]:
        square = sum(map(of_a_part, parts))
        return square, [made.choices(part) for part in parts] if section.contribution == LAYERS else []

    try:
        done = await asyncio.gather(*(offload(work, parts) for parts in grouped(fragment.parts)))
    except CodecError:
        return made
    measured = [choices for _, group in done for choices in group]
    mix = await offload(mix_of, measured) if measured else b""
    return dataclasses.replace(made, norm=math.sqrt(sum(square for square, _ in done)), mix=mix)


def grouped(parts: Sequence[Part]) -> list[Sequence[Part]]:
    """Runs of parts of about _GROUP_VALUES values, each one piece of off-loop work."""
    each = max(1, _GROUP_VALUES // parts[0].count)
    return [parts[i : i + each] for i in range(0, len(parts), each)]
