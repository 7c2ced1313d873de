"""Which codec a RunSpec names. Called by rounds."""

from __future__ import annotations

from shoal.compression.codec import Codec, CodecError
from shoal.compression.float32 import Float32
from shoal.compression.int8 import BLOCKS, Int8

_BY_TAG: dict[str, Codec] = {codec.tag: codec for codec in (Float32(), *(Int8(block) for block in BLOCKS))}
_TAGS: dict[str, str] = {}  # family -> tag, where they differ and the spec sets nothing


def codec_for(family: str, block: int) -> Codec:
    """The codec of a family; `block` is for int8, the others have a block of their own.

    `family+zlib` chains an entropy coder. Raises CodecError for a family this version does not know.
    """
    base, plus, coder = family.partition("+")
    tag = f"int8/{block}" if base == "int8" else _TAGS.get(base, base)
    return codec_by_tag(tag + plus + coder)


def codec_by_tag(tag: str) -> Codec:
    """Raises CodecError for a tag this version does not know."""
    codec = _BY_TAG.get(tag)
    if codec is None:
        raise CodecError(f"no codec is called {tag[:32]!r}; known: {', '.join(sorted(_BY_TAG))}")
    return codec
