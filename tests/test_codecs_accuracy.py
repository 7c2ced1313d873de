"""How far decoded values are from what was encoded: bounds of a value, errors of a round, and bias."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from codecs_world import every_path, gaussian, odd_values, on, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression.codec import Codec, CodecError
from shoal.compression.int4 import Int4
from shoal.compression.int8 import BLOCKS, Int8
from shoal.compression.onebit import OneBit
from shoal.compression.registry import codec_by_tag
from shoal.compression.topk import CHUNK, DENSITY, TopK2, TopK8

every_block = pytest.mark.parametrize("block", BLOCKS)


def after_a_round(tag: str, deltas: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(published mean, true mean): quantised once by each peer and once by the owner."""
    codec, count = codec_by_tag(tag), deltas[0].numel()
    total = torch.zeros(count)
    for delta in deltas:
        codec.add_decoded(codec.encode(delta), count, 1 / len(deltas), total)
    return codec.decode(codec.encode(total), count), torch.stack(deltas).double().mean(0)


def peers(draw: Callable[[int], torch.Tensor], number: int = 4) -> list[torch.Tensor]:
    return [draw(seed) for seed in range(number)]


def one_sided(seed: int) -> torch.Tensor:
    return gaussian(1 << 18, seed) * 1e-3 - 0.1


def narrow(seed: int) -> torch.Tensor:
    return torch.rand(1 << 18, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.09


def log_normal(seed: int) -> torch.Tensor:
    return gaussian(1 << 18, seed).exp()


def student_t(seed: int) -> torch.Tensor:
    """Three degrees of freedom."""
    return gaussian(1 << 18, seed) / (gaussian(3 << 18, 100 + seed).view(3, -1).square().mean(0)).sqrt()


@settings(deadline=None, max_examples=200)
@given(count=st.integers(1, 2100), seed=st.integers(0, 1 << 32), block=st.sampled_from(BLOCKS))
def test_int8_error_is_half_a_step_of_its_block(count: int, seed: int, block: int) -> None:
    codec, x = Int8(block), odd_values(count, seed)
    try:
        decoded = codec.decode(codec.encode(x), count)
    except CodecError:
        assert float(x.abs().max()) > 1e38
        return
    for start in range(0, count, block):
        part, found = x[start : start + block].double(), decoded[start : start + block].double()
        largest, reach = float(part.abs().max()), float(part.max() - part.min()) / 2
        # The offset is up to 2^-8 of itself off the middle, a scale up to 2^-7 more than it must be; what is
        # below the smallest scale becomes 0; fp32 itself rounds at 2^-24.
        step = (reach + largest * 2.0**-8) * (1 + 2.0**-7) / 127
        bound = step * 0.5 * (1 + 1e-4) + largest * 2.0**-22 + 1.6e-36
        assert float((part - found).abs().max()) <= bound


@every_path
@every_block
def test_int8_is_within_one_percent_after_both_legs_of_a_round(block: int, path: str) -> None:
    limit = {256: 0.0094, 512: 0.0100, 1024: 0.0107}[block]
    with on(path):
        published, mean = after_a_round(f"int8/{block}", peers(lambda seed: gaussian(1 << 18, seed)))
    assert relative_error(published, mean) <= limit
    assert abs(float((published - mean).mean() / mean.std())) <= 5e-4


@every_path
@every_block
@pytest.mark.parametrize("draw", [one_sided, narrow, log_normal])
def test_int8_is_unbiased_on_one_sided_values(
    draw: Callable[[int], torch.Tensor], block: int, path: str
) -> None:
    with on(path):
        published, mean = after_a_round(f"int8/{block}", peers(draw))
    assert abs(float((published - mean).mean() / mean.std())) <= 2e-3


@pytest.mark.parametrize(("draw", "limit"), [(log_normal, 0.020), (student_t, 0.021)])
def test_int8_on_heavy_tails(draw: Callable[[int], torch.Tensor], limit: float) -> None:
    published, mean = after_a_round("int8/256", peers(draw))
    assert relative_error(published, mean) <= limit


@every_path
def test_zeros_stay_zeros_and_constants_nearly_constants(path: str) -> None:
    with on(path):
        for tag in ("int8/256", "int4/128", "onebit/256", "topk2/64", "topk8/64"):
            codec = codec_by_tag(tag)
            assert torch.equal(codec.decode(codec.encode(torch.zeros(700)), 700), torch.zeros(700))
            assert bytes(codec.encode(-torch.zeros(700))) == bytes(codec.encode(torch.zeros(700)))
        for value in (0.1, -3.7e-5, 1e30, -1.0):
            decoded = Int8().decode(Int8().encode(torch.full((700,), value)), 700)
            assert torch.allclose(decoded, torch.full((700,), value), rtol=2.0**-16, atol=0.0)
        decoded = OneBit().decode(OneBit().encode(torch.full((700,), -0.1)), 700)
        assert torch.allclose(decoded, torch.full((700,), -0.1), rtol=2.0**-8, atol=0.0)


@every_path
def test_int8_rounds_half_to_even(path: str) -> None:
    x = torch.zeros(256)
    x[:6] = torch.tensor([127.0, -127.0, 0.5, 1.5, 2.5, -2.5])
    with on(path):
        assert Int8().decode(Int8().encode(x), 6 + 250)[:6].tolist() == [127.0, -127.0, 0.0, 2.0, 2.0, -2.0]


@every_path
def test_int4_error_is_half_a_step_where_nothing_is_cut(path: str) -> None:
    x = gaussian(1 << 16)
    with on(path):
        error = (Int4().decode(Int4().encode(x), 1 << 16) - x).view(-1, 128).abs()
    step = x.view(-1, 128).abs().amax(1, keepdim=True) / 8.25 * (1 + 2.0**-8)
    inside = x.view(-1, 128).abs() <= 7 * step
    assert bool((error <= step * 0.5001)[inside].all())
    assert bool((error <= step * 1.26).all())  # 8.25 − 7, at the far end of the side with fewer codes


@every_path
def test_int4_is_within_a_tenth_on_gaussian_values_and_unbiased(path: str) -> None:
    x = gaussian(1 << 20)
    with on(path):
        decoded = Int4().decode(Int4().encode(x), 1 << 20)
    assert relative_error(decoded, x) <= 0.1015
    assert abs(float((decoded - x).mean())) <= 5e-4
    assert relative_error(*after_a_round("int4/128", peers(lambda seed: gaussian(1 << 18, seed)))) <= 0.145


@pytest.mark.parametrize("draw", [one_sided, narrow, log_normal])
def test_what_int4_rounds_one_way_on_one_sided_values_comes_back_with_feedback(
    draw: Callable[[int], torch.Tensor],
) -> None:
    """By magnitude: of a mean that is a hundred deviations, as in `one_sided`, more rounds are needed."""
    codec, residual, rounds = Int4(), torch.zeros(1 << 18), 3
    for seed in range(rounds):
        wanted = draw(seed) + residual
        residual = wanted - codec.decode(codec.encode(wanted), wanted.numel())
    assert abs(float(residual.double().mean() / rounds / draw(0).square().mean().sqrt())) <= 0.01


@every_path
@pytest.mark.parametrize("count", [256, 1000, 1])
def test_onebit_keeps_signs_and_the_mean_magnitude_of_each_block(count: int, path: str) -> None:
    x = gaussian(count)
    with on(path):
        decoded = OneBit().decode(OneBit().encode(x), count)
    assert torch.equal(decoded < 0, x < 0)
    for part, found in zip(torch.split(x, 256), torch.split(decoded, 256), strict=True):
        assert float(found.abs().max()) == float(found.abs().min())
        assert float(found[0].abs()) == pytest.approx(float(part.abs().mean()), rel=2.0**-8)


def test_onebit_on_gaussian_values_errs_as_the_formula_says() -> None:
    x = gaussian(1 << 18)
    expected = (1 - 2 / torch.pi) ** 0.5  # of sign · mean
    assert relative_error(OneBit().decode(OneBit().encode(x), 1 << 18), x) == pytest.approx(
        expected, rel=2e-3
    )


@pytest.mark.parametrize(("codec", "error"), [(TopK2(), 0.1), (TopK8(), 0.004)], ids=["topk2", "topk8"])
@pytest.mark.parametrize("count", [1, 64, 65, 4096, 3 * 4096 + 200])
def test_topk_keeps_the_largest_of_each_chunk_and_their_signs(codec: Codec, error: float, count: int) -> None:
    x = gaussian(count)
    decoded = codec.decode(codec.encode(x), count)
    for part, found in zip(torch.split(x, CHUNK), torch.split(decoded, CHUNK), strict=True):
        kept = -(-part.numel() // DENSITY)
        largest = part.abs().topk(kept).indices
        assert torch.equal(found.nonzero().view(-1), largest.sort().values)
        assert torch.equal(found[largest].sign(), part[largest].sign())
    nonzero = decoded != 0
    assert relative_error(decoded[nonzero], x[nonzero]) <= error


def test_topk_keeps_the_earlier_of_equals() -> None:
    x = torch.ones(CHUNK)
    x[7] = -1.0
    x[CHUNK - 1] = 2.0
    decoded = TopK8().decode(TopK8().encode(x), CHUNK)
    assert decoded.nonzero().view(-1).tolist() == [*range(CHUNK // DENSITY - 1), CHUNK - 1]
    assert float(decoded[7]) < 0


@pytest.mark.parametrize(
    ("tag", "rounds", "limit"), [("int4/128", 20, 0.01), ("onebit/256", 200, 0.07), ("topk2/64", 600, 0.25)]
)
def test_error_feedback_brings_in_what_rounding_left_out(tag: str, rounds: int, limit: float) -> None:
    codec, x = codec_by_tag(tag), gaussian(1 << 14)
    residual, sent = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(rounds):
        wanted = x + residual
        decoded = codec.decode(codec.encode(wanted), x.numel())
        residual = wanted - decoded
        sent += decoded
    assert relative_error(sent / rounds, x) <= limit
