"""Which codec a RunSpec names. Called by rounds."""

from __future__ import annotations

from shoal.compression.codec import Codec, CodecError
from shoal.compression.float32 import Float32
from shoal.compression.int8 import BLOCKS, Int8

_BY_TAG: dict[str, Codec] = {codec.tag: codec for codec in (Float32(), *(Int8(block) for block in BLOCKS))}


def codec_for(family: str, block: int) -> Codec:
    """The codec of a family, with blocks of `block` values where the family has blocks."""
    return codec_by_tag(family if family == "float32" else f"{family}/{block}")


def codec_by_tag(tag: str) -> Codec:
    """Raises CodecError for a tag this version does not know."""
    codec = _BY_TAG.get(tag)
    if codec is None:
        raise CodecError(f"no codec is called {tag[:32]!r}; known: {', '.join(sorted(_BY_TAG))}")
    return codec
