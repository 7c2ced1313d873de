"""Which codecs a round uses: its leader writes them into the draft, everybody else reads them there. Pure.

One codec a leg for all parts, or with the family `layers` one a part for both legs: layers differ by orders
of magnitude in what rounding costs them, so bits go where they save most error (L-GreCo, arXiv 2210.17357). A
part is a slice of few layers; what each family would lose is measured on a sample of what is contributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.compression.choice import Choice, allocate_bits, codec_for_link
from shoal.compression.codec import Codec, CodecError
from shoal.compression.registry import codec_by_tag, codec_for
from shoal.protocol.errors import MessageInvalid
from shoal.training.outer.entry import Entry
from shoal.training.spec import CompressionSection

WARMUP_FAMILY = "int8"
LAYERS = "layers"
FEWER_BITS = ("int4", "onebit")  # what `Entry.mix` may say of a part: 0 its leg's own codec, 1 and 2 these
_REFERENCE = 1  # whose error on all parts together is the budget: `layers` loses no more than int4 would
_ROUNDING = 1.05  # of the budget, since the allocation counts errors in whole steps
_SAMPLE_PIECES, _SAMPLE_VALUES = 8, 1024  # of a part: several blocks of every codec in one piece


@dataclass(frozen=True, slots=True)
class RoundCodecs:
    """The codecs of one round. Parts are counted from the fragment's first."""

    legs: tuple[Codec, Codec]
    by_part: tuple[tuple[Codec, Codec], ...] = ()

    def contribution(self, part: int) -> Codec:
        """What contributions to a part are encoded with."""
        return (self.by_part[part] if self.by_part else self.legs)[0]

    def published(self, part: int) -> Codec:
        """What a part's mean is encoded with."""
        return (self.by_part[part] if self.by_part else self.legs)[1]


def round_codecs(section: CompressionSection, height: int, uplink_bytes_per_s: float) -> tuple[str, str]:
    """The tags of (contribution, published mean) at a height, for parts of which no mix says otherwise.

    `uplink_bytes_per_s` is the slowest of the roster, 0 where it is not known. Below 8 bits the first
    `warmup_rounds` go in int8: early deltas are large and change fast (1-bit Adam, arXiv
    2102.02888, section 4).
    """
    by_link = codec_for_link(8 * uplink_bytes_per_s) if uplink_bytes_per_s else (WARMUP_FAMILY,) * 2
    chosen = (
        {"auto": family, LAYERS: WARMUP_FAMILY}.get(wanted, wanted)
        for wanted, family in zip((section.contribution, section.published), by_link, strict=True)
    )
    contribution, published = (_tag(section, family, height) for family in chosen)
    return contribution, published


def usual_codecs(section: CompressionSection) -> tuple[str, str]:
    """The tags after the warm-up where no link is known, for forecasts; `layers` counts as int4, its most."""
    if section.contribution == LAYERS:
        return (_tag(section, FEWER_BITS[_REFERENCE - 1], section.warmup_rounds + 1),) * 2
    return round_codecs(section, section.warmup_rounds + 1, 0.0)


def codec_of(tag: str) -> Codec:
    """The codec an entry names. Raises MessageInvalid for one this version does not know."""
    try:
        return codec_by_tag(tag)
    except CodecError as error:
        raise MessageInvalid(str(error)) from error


def codecs_of(entry: Entry, parts: int) -> RoundCodecs:
    """Those of an entry or draft of a fragment of so many parts. Raises MessageInvalid."""
    legs = codec_of(entry.contribution), codec_of(entry.published)
    if not entry.mix:
        return RoundCodecs(legs)
    if len(entry.mix) != parts or max(entry.mix) > len(FEWER_BITS):
        raise MessageInvalid(f"entry {entry.height}: a mix of codecs for {len(entry.mix)} parts of {parts}")
    _, plus, coder = entry.contribution.partition("+")
    fewer = (codec_for(family + plus + coder, 256) for family in FEWER_BITS)
    choices = [legs, *((codec, codec) for codec in fewer)]
    return RoundCodecs(legs, tuple(choices[code] for code in entry.mix))


def sample(values: torch.Tensor) -> torch.Tensor:
    """Some of a part's values, evenly spread, in pieces as long as the largest block."""
    pieces = values.numel() // _SAMPLE_VALUES
    if pieces <= _SAMPLE_PIECES:
        return values
    starts = [pieces * i // _SAMPLE_PIECES * _SAMPLE_VALUES for i in range(_SAMPLE_PIECES)]
    return torch.cat([values[start : start + _SAMPLE_VALUES] for start in starts])


def measure(section: CompressionSection, values: torch.Tensor, count: int) -> list[Choice]:
    """What each code of a mix would cost a part of `count` values, of which `values` are a sample."""
    choices = []
    for family in (WARMUP_FAMILY, *FEWER_BITS):
        codec = codec_for(family, section.block)
        lost = codec.decode(codec.encode(values), values.numel()).sub_(values).double()
        error = float(lost.dot(lost)) * count / values.numel()
        choices.append(Choice(family, codec.encoded_bytes(count), error))
    return choices


def mix_of(measured: Sequence[Sequence[Choice]]) -> bytes:
    """`Entry.mix` for a fragment's parts: the fewest bytes that lose no more than int4 everywhere would."""
    budget = sum(choices[_REFERENCE].squared_error for choices in measured)
    chosen = allocate_bits(measured, _ROUNDING * budget)
    return bytes(list(choices).index(choice) for choices, choice in zip(measured, chosen, strict=True))


def _tag(section: CompressionSection, family: str, height: int) -> str:
    codec = codec_for(family, section.block)
    if codec.needs_feedback and height <= section.warmup_rounds:
        codec = codec_for(WARMUP_FAMILY, section.block)
    return codec.tag + ("" if section.entropy == "none" else f"+{section.entropy}")
