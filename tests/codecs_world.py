"""Values that codecs are tested on, and the two ways their work is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from shoal.compression import kernels
from shoal.compression.codec import Codec, CodecError
from shoal.compression.registry import codec_by_tag

PATHS = ("compiled", "portable")
FAMILY_TAGS = (
    "float32",
    "bfloat16",
    "int8/256",
    "int8/1024",
    "int4/128",
    "onebit/256",
    "topk2/64",
    "topk8/64",
    "int8/512+zlib",
    "int4/128+zlib",
    "topk2/64+zlib",
)
FUSED_TAGS = ("int8/256", "int8/512", "int8/1024", "int4/128", "onebit/256")
every_codec = pytest.mark.parametrize("codec", [codec_by_tag(tag) for tag in FAMILY_TAGS], ids=FAMILY_TAGS)
every_path = pytest.mark.parametrize("path", PATHS)


@contextmanager
def on(path: str) -> Iterator[None]:
    """Codecs work this way inside."""
    before = kernels.active
    if path == "portable":
        kernels.active = None
    elif kernels.active is None:
        assert kernels.warm()
    try:
        yield
    finally:
        kernels.active = before


def gaussian(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def odd_values(count: int, seed: int) -> torch.Tensor:
    """Finite values of a kind the seed draws: any magnitude, denormal, huge, sparse, constant, −0."""
    draw = np.random.default_rng(seed)
    kind = draw.integers(8)
    if kind == 0:
        bits = draw.integers(0, 1 << 32, count, dtype=np.uint32)
        bits[(bits & 0x7F800000) == 0x7F800000] = 0x80000000
        x = bits.view(np.float32)
    elif kind == 1:
        x = draw.choice(np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38], np.float32), count)
    elif kind == 2:
        x = np.full(count, draw.normal() * 10.0 ** draw.integers(-44, 38), np.float32)
    else:
        x = (draw.normal(size=count) * 10.0 ** draw.integers(-44, 37)).astype(np.float32)
    if kind >= 5:
        x[draw.random(count) < 0.9] = 0.0
    if kind == 6:
        x = np.abs(x)
    if kind == 7:
        x += np.float32(draw.normal())
    return torch.from_numpy(x)


def encoded_or_refused(codec: Codec, values: torch.Tensor) -> bytes | None:
    try:
        return bytes(codec.encode(values))
    except CodecError:
        return None


def decoded_or_refused(codec: Codec, data: bytes, count: int) -> torch.Tensor | None:
    try:
        return codec.decode(data, count)
    except CodecError:
        return None


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.view(torch.int32), second.view(torch.int32))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
