"""What every codec promises: sizes, determinism, sums without a decoded copy, and refusal of bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from codecs_world import every_codec, every_path, gaussian, odd_values, on, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression.codec import Codec, CodecError
from shoal.compression.registry import codec_by_tag, codec_for

SIZES = [0, 1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 4095, 4096, 4097, 5000]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@every_path
@every_codec
@pytest.mark.parametrize("count", SIZES)
def test_size_is_known_beforehand_and_shape_comes_back(codec: Codec, count: int, path: str) -> None:
    with on(path):
        encoded = codec.encode(gaussian(count))
        decoded = codec.decode(encoded, count)
    size = memoryview(encoded).nbytes
    assert size == codec.encoded_bytes(count) if codec.exact else size <= codec.encoded_bytes(count)
    assert decoded.shape == (count,)
    assert decoded.dtype is torch.float32


@pytest.mark.parametrize(
    ("tag", "share"),
    [
        ("float32", 1.0),
        ("bfloat16", 0.5),
        ("int8/256", 0.254),
        ("int8/512", 0.252),
        ("int8/1024", 0.251),
        ("int4/128", 0.129),
        ("onebit/256", 0.0333),
        ("topk2/64", 0.0071),
        ("topk8/64", 0.0099),
    ],
)
def test_share_of_fp32_on_the_wire(tag: str, share: float) -> None:
    count = 1 << 20
    assert share * 0.99 < codec_by_tag(tag).encoded_bytes(count) / (4 * count) <= share


@every_path
@every_codec
def test_equal_values_give_equal_bytes_and_input_stays(codec: Codec, path: str) -> None:
    x = gaussian(5000)
    before = x.clone()
    with on(path):
        assert bytes(codec.encode(x)) == bytes(codec.encode(x.clone()))
    assert torch.equal(x, before)


@every_codec
@pytest.mark.parametrize("device", DEVICES)
def test_values_on_another_device_and_in_strides_give_the_same_bytes(codec: Codec, device: str) -> None:
    x = gaussian(10_000)
    with on("compiled"):
        expected = bytes(codec.encode(x[::2].clone()))
        assert bytes(codec.encode(x[::2])) == expected
    with on("portable"):
        assert bytes(codec.encode(x.to(device)[::2])) == expected


@every_path
@every_codec
@pytest.mark.parametrize("count", [0, 1, 257, 5000])
@pytest.mark.parametrize("weight", [0.3, 1.0, -2.5, 0.0, 1e-30])
def test_adding_encoded_values_is_decoding_multiplying_and_adding(
    codec: Codec, count: int, weight: float, path: str
) -> None:
    with on(path):
        encoded, total = codec.encode(gaussian(count)), gaussian(count, seed=1)
        decoded = codec.decode(encoded, count)
        expected = total + decoded * weight
        squared = codec.add_decoded(encoded, count, weight, total)
    assert same_bits(total, expected)
    assert squared == pytest.approx(float(decoded.double().square().sum()), rel=1e-6)


@every_path
@every_codec
def test_refused_bytes_leave_the_total_alone(codec: Codec, path: str) -> None:
    data, total = bytearray(codec.encode(gaussian(300))), torch.ones(300)
    data[:4] = b"\xff\xff\xff\xff"  # not finite, as a value and as a scale; no frame of zlib
    with on(path):
        for bad in (bytes(data), bytes(codec.encode(gaussian(300)))[:-1]):
            with pytest.raises(CodecError):
                codec.add_decoded(bad, 300, 1.0, total)
    assert torch.equal(total, torch.ones(300))


@every_path
@every_codec
@pytest.mark.parametrize("count", [0, 300, 70_001])
def test_a_weighted_sum_is_adding_one_by_one_and_leaves_out_what_is_refused(
    codec: Codec, count: int, path: str
) -> None:
    weights = [0.5, 0.2, 0.3, 1e-30]
    with on(path):
        encoded = [codec.encode(gaussian(count, seed)) for seed in range(4)]
        expected, squares = torch.zeros(count), []
        for data, weight in zip(encoded, weights, strict=True):
            squares.append(codec.add_decoded(data, count, weight, expected))
        bad = bytes(encoded[0]) + b"\x00"
        given = [
            *zip(encoded[:2], weights[:2], strict=True),
            (bad, 1.0),
            *zip(encoded[2:], weights[2:], strict=True),
        ]
        total, found = codec.weighted_sum(given, count)
    assert same_bits(total, expected)
    assert isinstance(found.pop(2), CodecError)
    assert found == pytest.approx(squares, rel=1e-6)


@every_path
@every_codec
def test_a_total_of_another_shape_is_refused(codec: Codec, path: str) -> None:
    encoded = codec.encode(gaussian(300))
    with on(path):
        for total in (
            torch.ones(299),
            torch.ones(301),
            torch.ones(300, dtype=torch.float64),
            torch.ones(1, 300),
        ):
            with pytest.raises(CodecError):
                codec.add_decoded(encoded, 300, 1.0, total)


@every_path
@every_codec
def test_decoded_values_have_memory_of_their_own(codec: Codec, path: str) -> None:
    with on(path):
        data = bytearray(codec.encode(gaussian(300)))
        before = bytes(data)
        codec.decode(data, 300).fill_(7.0)
    assert bytes(data) == before


@every_path
@every_codec
@pytest.mark.parametrize("bad", [float("nan"), float("-nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 255, 650, 699])
def test_values_that_are_not_finite_are_not_encoded(codec: Codec, bad: float, place: int, path: str) -> None:
    x = gaussian(700)
    x[place] = bad
    with on(path), pytest.raises(CodecError):
        codec.encode(x)


@every_codec
def test_only_flat_fp32_tensors_are_encoded(codec: Codec) -> None:
    for values in (torch.ones(4, 4), torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.int32)):
        with pytest.raises(CodecError):
            codec.encode(values)


@every_path
@every_codec
@settings(deadline=None, max_examples=40)
@given(count=st.integers(0, 700), seed=st.integers(0, 1 << 32))
def test_any_finite_values_come_back_finite_or_are_refused(
    codec: Codec, path: str, count: int, seed: int
) -> None:
    x = odd_values(count, seed)
    with on(path):
        try:
            encoded = codec.encode(x)
        except CodecError:
            assert float(x.abs().max()) > 1e38
            return
        assert bool(codec.decode(encoded, count).isfinite().all())


@every_path
@every_codec
def test_every_flipped_bit_is_refused_or_decodes_to_finite_values(codec: Codec, path: str) -> None:
    x = gaussian(131)
    x[128:] = 0.0
    encoded = bytes(codec.encode(x))
    with on(path):
        for place in range(8 * len(encoded)):
            data = bytearray(encoded)
            data[place // 8] ^= 1 << place % 8
            try:
                decoded = codec.decode(data, 131)
            except CodecError:
                continue
            assert bool(decoded.isfinite().all()), f"bit {place}"


@every_path
@every_codec
def test_every_truncation_and_extension_is_refused(codec: Codec, path: str) -> None:
    encoded = bytes(codec.encode(gaussian(300)))
    with on(path):
        for data in (
            *(encoded[:size] for size in range(len(encoded))),
            encoded + b"\0",
            encoded + bytes(400),
        ):
            with pytest.raises(CodecError):
                codec.check(data, 300)


@every_path
@every_codec
@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=1300), count=st.integers(0, 600))
def test_any_bytes_decode_to_finite_values_or_are_refused(
    codec: Codec, path: str, data: bytes, count: int
) -> None:
    size = codec.encoded_bytes(count)
    with on(path):
        for some in (data, (data * 9)[:size].ljust(size, b"\0")):
            try:
                decoded = codec.decode(some, count)
            except CodecError:
                continue
            assert decoded.numel() == count
            assert bool(decoded.isfinite().all())


def test_bytes_need_not_be_aligned() -> None:
    with on("compiled"):
        for tag in ("int8/256", "int4/128", "onebit/256", "topk2/64"):
            codec = codec_by_tag(tag)
            encoded = bytes(codec.encode(gaussian(1000)))
            shifted = memoryview(b"\0" + encoded)[1:]
            assert same_bits(codec.decode(shifted, 1000), codec.decode(encoded, 1000))


def test_float32_is_exact_and_bfloat16_rounds_half_to_even() -> None:
    x = odd_values(5000, seed=3)
    assert same_bits(codec_by_tag("float32").decode(codec_by_tag("float32").encode(x), 5000), x)
    half = torch.tensor([1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, -1.0 - 2.0**-8, 1e-45, -0.0])
    bfloat16 = codec_by_tag("bfloat16")
    assert bfloat16.decode(bfloat16.encode(half), 5).tolist() == [1.0, 1.0 + 2.0**-6, -1.0, 0.0, -0.0]


@pytest.mark.parametrize("tag", ["float32", "bfloat16"])
def test_raw_numbers_that_are_not_finite_are_refused(tag: str) -> None:
    data = bytearray(codec_by_tag(tag).encode(gaussian(2)))
    data[-2:] = np.array([0x7FC0], "<u2").tobytes()
    with pytest.raises(CodecError):
        codec_by_tag(tag).check(data, 2)


def test_registry_knows_what_a_spec_can_name() -> None:
    assert codec_for("int8", 512).tag == "int8/512"
    assert codec_for("int8+zlib", 1024).tag == "int8/1024+zlib"
    tags = {"float32": "float32", "bfloat16": "bfloat16", "int4": "int4/128", "onebit": "onebit/256"}
    tags |= {"topk2": "topk2/64", "topk8": "topk8/64", "int4+zlib": "int4/128+zlib"}
    for family, tag in tags.items():
        codec = codec_for(family, 512)
        assert codec.tag == tag
        assert codec is codec_by_tag(tag)
    for family in ("int7", "int8+zlib+zlib", "zlib", "", "int8/256", "float32/256"):
        with pytest.raises(CodecError):
            codec_for(family, 256)


def test_feedback_is_needed_below_8_bits_only() -> None:
    needing = {family for family in ("float32", "bfloat16", "int8", "int4", "onebit", "topk2", "topk8")}
    assert {family for family in needing if codec_for(family, 256).needs_feedback} == {
        "int4",
        "onebit",
        "topk2",
        "topk8",
    }
    assert codec_for("int4+zlib", 256).needs_feedback
    assert not codec_for("int8+zlib", 256).needs_feedback
