"""Bytes that no encoder makes, kind by kind, and chains that unpack to more than they may."""

from __future__ import annotations

import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from codecs_world import every_path, gaussian, on

from shoal.compression.codec import CodecError
from shoal.compression.registry import codec_by_tag

COUNT = 301  # two blocks of 256, three of 128, and an odd tail


def bfloat16(value: float) -> bytes:
    return (np.array([value], np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()


def refused(tag: str, change: Callable[[bytearray], None], path: str) -> None:
    codec = codec_by_tag(tag)
    data = bytearray(codec.encode(gaussian(COUNT)))
    codec.check(data, COUNT)
    change(data)
    with on(path), pytest.raises(CodecError):
        codec.check(data, COUNT)


BAD_SCALES = [float("nan"), float("inf"), float("-inf"), -0.0, 1e-39, -1e-39]


@every_path
@pytest.mark.parametrize("tag", ["int8/256", "int4/128", "onebit/256", "topk2/64", "topk8/64"])
@pytest.mark.parametrize("scale", BAD_SCALES)
def test_a_scale_that_is_not_zero_or_a_normal_number(tag: str, scale: float, path: str) -> None:
    def change(data: bytearray) -> None:
        data[:2] = bfloat16(scale)

    refused(tag, change, path)


@every_path
@pytest.mark.parametrize("tag", ["int8/256", "onebit/256", "topk2/64", "topk8/64"])
def test_a_negative_scale_where_scales_are_magnitudes(tag: str, path: str) -> None:
    def change(data: bytearray) -> None:
        data[1] |= 0x80

    refused(tag, change, path)


@every_path
@pytest.mark.parametrize("tag", ["int8/256", "int4/128", "topk8/64"])
def test_a_scale_with_which_codes_would_not_be_finite(tag: str, path: str) -> None:
    def change(data: bytearray) -> None:
        data[:2] = bfloat16(3e38)

    refused(tag, change, path)


@every_path
@pytest.mark.parametrize("offset", [*BAD_SCALES, 3.38e38])
def test_an_int8_offset_that_no_encoder_makes(offset: float, path: str) -> None:
    def change(data: bytearray) -> None:
        data[:2] = bfloat16(1e35)
        data[4:6] = bfloat16(offset)

    refused("int8/256", change, path)


@every_path
@pytest.mark.parametrize("tag", ["int8/256", "topk8/64"])
def test_code_minus_128(tag: str, path: str) -> None:
    def change(data: bytearray) -> None:
        data[-1] = 0x80

    refused(tag, change, path)


@every_path
@pytest.mark.parametrize("tag", ["int8/256", "int4/128", "onebit/256", "topk2/64", "topk8/64"])
def test_codes_under_a_scale_of_zero(tag: str, path: str) -> None:
    def change(data: bytearray) -> None:
        scales = 4 if tag == "topk2/64" else 2
        data[:scales] = bytes(scales)

    codec = codec_by_tag(tag)
    x = gaussian(COUNT)
    x[:5] = -9.0  # one bit: a block has a sign that is not 0
    data = bytearray(codec.encode(x))
    change(data)
    with on(path), pytest.raises(CodecError):
        codec.check(data, COUNT)


@every_path
@pytest.mark.parametrize("tag", ["int4/128", "onebit/256", "topk2/64"])
def test_bits_behind_the_last_value(tag: str, path: str) -> None:
    def change(data: bytearray) -> None:
        data[-1] |= 0x80

    refused(tag, change, path)


def test_bits_behind_the_last_index() -> None:
    def change(data: bytearray) -> None:
        data[4 + 7] |= 0x80  # five indices take 7.5 bytes

    refused("topk2/64", change, "portable")


@pytest.mark.parametrize("index", [COUNT, 4095, 0])
def test_indices_out_of_range_or_order(index: int) -> None:
    def change(data: bytearray) -> None:
        data[2 + 6 : 2 + 8] = index.to_bytes(2, "little")  # the fifth and last

    refused("topk8/64", change, "portable")


def test_an_index_twice() -> None:
    codec = codec_by_tag("topk8/64")
    data = bytearray(codec.encode(torch.cat((torch.ones(2), torch.zeros(100)))))
    data[2:5] = bytes([1, 1 << 4, 0])  # indices 1 and 1
    with pytest.raises(CodecError):
        codec.check(data, 102)


@pytest.mark.parametrize("low_high", [(2.0, 1.0), (0.0, -1.0)])
def test_topk2_magnitudes_out_of_order(low_high: tuple[float, float]) -> None:
    def change(data: bytearray) -> None:
        data[:4] = b"".join(map(bfloat16, low_high))

    refused("topk2/64", change, "portable")


def deflated(data: bytes) -> bytes:
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return b"\1" + deflate.compress(data) + deflate.flush()


def test_a_chain_is_smaller_where_values_repeat_and_a_byte_longer_at_most() -> None:
    chain, inner = codec_by_tag("int4/128+zlib"), codec_by_tag("int4/128")
    assert not chain.exact
    for x in (torch.zeros(5000), gaussian(5000), gaussian(3)):
        encoded, plain = bytes(chain.encode(x)), bytes(inner.encode(x))
        assert len(encoded) <= 1 + len(plain) == chain.encoded_bytes(x.numel())
        assert torch.equal(chain.decode(encoded, x.numel()), inner.decode(plain, x.numel()))
    assert len(bytes(chain.encode(torch.zeros(5000)))) < 60
    assert bytes(chain.encode(gaussian(3)))[0] == 0  # as it is


def test_a_chain_never_unpacks_more_than_the_values_take() -> None:
    chain = codec_by_tag("int8/256+zlib")
    bomb = deflated(bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            chain.check(bomb, 1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_chain_refuses_frames_that_no_encoder_makes() -> None:
    chain, inner = (
        codec_by_tag("onebit/256+zlib"),
        bytes(codec_by_tag("onebit/256").encode(torch.zeros(4096))),
    )
    good = deflated(inner)
    chain.check(good, 4096)
    longer = deflated(bytes(len(inner) + 1))
    random = np.random.default_rng(0).bytes(len(inner))
    for bad in (b"", b"\2" + inner, good + b"\0", good[:-1], longer, deflated(inner[:-1]), deflated(random)):
        with pytest.raises(CodecError):
            chain.check(bad, 4096)
