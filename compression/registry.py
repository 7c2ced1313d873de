"""Which codec a RunSpec names. Called by rounds."""

from __future__ import annotations

from shoal.compression.bfloat16 import Bfloat16
from shoal.compression.codec import Codec, CodecError
from shoal.compression.entropy import Entropy
from shoal.compression.float32 import Float32
from shoal.compression.int4 import Int4
from shoal.compression.int8 import BLOCKS, Int8
from shoal.compression.onebit import OneBit
from shoal.compression.topk import TopK2, TopK8

_CODECS: tuple[Codec, ...] = (
    Float32(),
    Bfloat16(),
    *(Int8(block) for block in BLOCKS),
    Int4(),
    OneBit(),
    TopK2(),
    TopK8(),
)
_BY_TAG: dict[str, Codec] = {codec.tag: codec for codec in (*_CODECS, *map(Entropy, _CODECS))}
_BY_FAMILY = {codec.tag.partition("/")[0]: codec.tag for codec in _CODECS}


def codec_for(family: str, block: int) -> Codec:
    """The codec of a family; `block` is for int8, the others have a block of their own.

    `family+zlib` chains an entropy coder. Raises CodecError for a family this version does not know.
    """
    base, plus, coder = family.partition("+")
    if base not in _BY_FAMILY:
        raise CodecError(f"no family of codecs is called {base[:32]!r}; known: {', '.join(_BY_FAMILY)}")
    tag = f"int8/{block}" if base == "int8" else _BY_FAMILY[base]
    return codec_by_tag(tag + plus + coder)


def codec_by_tag(tag: str) -> Codec:
    """Raises CodecError for a tag this version does not know."""
    codec = _BY_TAG.get(tag)
    if codec is None:
        raise CodecError(f"no codec is called {tag[:32]!r}; known: {', '.join(sorted(_BY_TAG))}")
    return codec
