"""Which codecs a round uses: its leader writes them into the draft, everybody else reads them there. Pure."""

from __future__ import annotations

from shoal.compression.choice import codec_for_link
from shoal.compression.codec import Codec, CodecError
from shoal.compression.registry import codec_by_tag, codec_for
from shoal.protocol.errors import MessageInvalid
from shoal.training.spec import CompressionSection

WARMUP_FAMILY = "int8"


def round_codecs(section: CompressionSection, height: int, uplink_bytes_per_s: float) -> tuple[str, str]:
    """The tags of (contribution, published mean) at a height.

    `uplink_bytes_per_s` is the slowest of the roster, 0 where it is not known. Below 8 bits the first
    `warmup_rounds` go in int8: early deltas are large and change fast (1-bit Adam, arXiv
    2102.02888, section 4).
    """
    by_link = codec_for_link(8 * uplink_bytes_per_s) if uplink_bytes_per_s else (WARMUP_FAMILY,) * 2
    chosen = (
        family if wanted == "auto" else wanted
        for wanted, family in zip((section.contribution, section.published), by_link, strict=True)
    )
    tags = []
    for family in chosen:
        codec = codec_for(family, section.block)
        if codec.needs_feedback and height <= section.warmup_rounds:
            codec = codec_for(WARMUP_FAMILY, section.block)
        tags.append(codec.tag + ("" if section.entropy == "none" else f"+{section.entropy}"))
    contribution, published = tags
    return contribution, published


def codec_of(tag: str) -> Codec:
    """The codec an entry names. Raises MessageInvalid for one this version does not know."""
    try:
        return codec_by_tag(tag)
    except CodecError as error:
        raise MessageInvalid(str(error)) from error
