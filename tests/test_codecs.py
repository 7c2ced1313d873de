"""Codecs: exact sizes, error bounds, determinism, and refusal of what no encoder makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression.codec import Codec, CodecError
from shoal.compression.float32 import Float32
from shoal.compression.int8 import BLOCKS, Int8
from shoal.compression.registry import codec_by_tag, codec_for

CODECS: list[Codec] = [Float32(), *(Int8(block) for block in BLOCKS)]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.tag)


def values(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@every_codec
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 5000])
def test_size_is_known_beforehand_and_shape_comes_back(codec: Codec, count: int) -> None:
    encoded = codec.encode(values(count))
    assert memoryview(encoded).nbytes == codec.encoded_bytes(count)
    decoded = codec.decode(encoded, count)
    assert decoded.shape == (count,)
    assert decoded.dtype is torch.float32


@every_codec
def test_equal_values_give_equal_bytes_and_input_stays(codec: Codec) -> None:
    x = values(3000)
    before = x.clone()
    assert bytes(codec.encode(x)) == bytes(codec.encode(x.clone()))
    assert torch.equal(x, before)


@every_codec
@pytest.mark.parametrize("count", [0, 1, 257, 5000])
def test_adding_what_was_encoded_is_decoding_multiplying_and_adding(codec: Codec, count: int) -> None:
    encoded, total = codec.encode(values(count)), values(count, seed=1)
    decoded = codec.decode(encoded, count)
    expected = total + decoded * 0.3
    squared = codec.add_decoded(encoded, count, 0.3, total)
    assert torch.equal(total, expected)
    assert squared == pytest.approx(float(decoded.double().square().sum()), rel=1e-6)


@every_codec
def test_refused_bytes_leave_the_total_alone(codec: Codec) -> None:
    total = torch.ones(300)
    with pytest.raises(CodecError):
        codec.add_decoded(bytes(codec.encode(values(300)))[:-1], 300, 1.0, total)
    assert torch.equal(total, torch.ones(300))


def test_float32_is_exact() -> None:
    x = values(1000)
    assert torch.equal(Float32().decode(Float32().encode(x), 1000), x)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=600),
    st.sampled_from(BLOCKS),
)
def test_int8_error_is_half_a_step_of_its_block(numbers: list[float], block: int) -> None:
    codec, x = Int8(block), torch.tensor(numbers, dtype=torch.float32)
    decoded = codec.decode(codec.encode(x), x.numel())
    for start in range(0, x.numel(), block):
        part, found = x[start : start + block].double(), decoded[start : start + block].double()
        step = float(part.abs().max()) / 127
        assert float((part - found).abs().max()) <= step * 0.5 * (1 + 1e-5) + 1.5e-36


def test_int8_is_below_one_percent_and_unbiased_on_gaussian_data() -> None:
    x = values(1 << 18)
    error = Int8(256).decode(Int8(256).encode(x), x.numel()) - x
    assert float(error.norm() / x.norm()) < 0.0085
    assert abs(float(error.mean())) < 1e-4


def test_int8_rounds_half_to_even() -> None:
    x = torch.zeros(256)
    x[:4] = torch.tensor([127.0, 0.5, 1.5, 2.5])
    assert Int8(256).decode(Int8(256).encode(x), 256)[:4].tolist() == [127.0, 0.0, 2.0, 2.0]


@every_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_not_encoded(codec: Codec, bad: float) -> None:
    x = values(700)
    x[650] = bad
    with pytest.raises(CodecError):
        codec.encode(x)


def test_int8_survives_the_ends_of_the_number_range() -> None:
    for magnitude in (1e-45, 1e-38, 1e37, 3e38):
        x = torch.full((300,), magnitude)
        assert torch.isfinite(Int8().decode(Int8().encode(x), 300)).all()


@every_codec
@pytest.mark.parametrize("change", [-1, 1, 4])
def test_wrong_sizes_are_refused(codec: Codec, change: int) -> None:
    encoded = bytes(codec.encode(values(300)))
    data = encoded[:change] if change < 0 else encoded + bytes(change)
    with pytest.raises(CodecError):
        codec.decode(data, 300)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0, -0.001, 1e-39, 3e38])
def test_int8_refuses_scales_that_no_encoder_makes(scale: float) -> None:
    data = bytearray(Int8().encode(values(300)))
    data[4:8] = np.float32(scale).tobytes()
    with pytest.raises(CodecError):
        Int8().decode(data, 300)


def test_int8_refuses_code_minus_128() -> None:
    data = bytearray(Int8().encode(values(300)))
    data[-1] = 0x80
    with pytest.raises(CodecError):
        Int8().decode(data, 300)


def test_float32_refuses_numbers_that_are_not_finite() -> None:
    with pytest.raises(CodecError):
        Float32().decode(np.array([1.0, np.nan], np.float32).tobytes(), 2)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=600), st.integers(0, 600), st.sampled_from(CODECS))
def test_any_bytes_decode_to_finite_values_or_are_refused(data: bytes, count: int, codec: Codec) -> None:
    try:
        decoded = codec.decode(data, count)
    except CodecError:
        return
    assert decoded.numel() == count
    assert torch.isfinite(decoded).all()


def test_registry_knows_what_a_spec_can_name() -> None:
    assert codec_for("float32", 512).tag == "float32"
    assert codec_for("int8", 512).tag == "int8/512"
    with pytest.raises(CodecError):
        codec_by_tag("int7/256")
