"""Compiled kernels and the portable path give the same bits and verdicts; without numba all works on."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from codecs_world import (
    FUSED_TAGS,
    decoded_or_refused,
    encoded_or_refused,
    gaussian,
    odd_values,
    on,
    same_bits,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.compression import scales
from shoal.compression.codec import Codec, CodecError
from shoal.compression.registry import codec_by_tag

fused = pytest.mark.parametrize("codec", [codec_by_tag(tag) for tag in FUSED_TAGS], ids=FUSED_TAGS)
sizes = st.one_of(st.integers(0, 1100), st.sampled_from([255, 256, 257, 511, 513, 1023, 1025, 2049]))


@fused
@settings(deadline=None, max_examples=300)
@given(count=sizes, seed=st.integers(0, 1 << 32), weight=st.floats(-4.0, 4.0, width=32))
def test_both_paths_agree_bit_for_bit(codec: Codec, count: int, seed: int, weight: float) -> None:
    x = odd_values(count, seed)
    with on("compiled"):
        encoded = encoded_or_refused(codec, x)
    with on("portable"):
        assert encoded_or_refused(codec, x) == encoded
    if encoded is None:
        return
    decoded, totals, squares = [], [], []
    for path in ("compiled", "portable"):
        with on(path):
            decoded.append(codec.decode(encoded, count))
            totals.append(gaussian(count))
            squares.append(codec.add_decoded(encoded, count, weight, totals[-1]))
    assert same_bits(*decoded)
    assert torch.equal(*totals) or not bool(totals[0].isfinite().all())
    assert squares[0] == pytest.approx(squares[1], rel=1e-6)


@fused
@settings(deadline=None, max_examples=150)
@given(count=sizes, seed=st.integers(0, 1 << 32), rate=st.floats(-4.0, 4.0, width=32), alone=st.booleans())
def test_one_pass_over_a_difference_gives_the_bits_of_many(
    codec: Codec, count: int, seed: int, rate: float, alone: bool
) -> None:
    values, minus, plus = gaussian(count, seed), gaussian(count, seed + 1), odd_values(count, seed)
    x = values if alone else (values - minus).add_(plus)
    with on("portable"):
        encoded = encoded_or_refused(codec, x)
    less, more = (None, None) if alone else (minus, plus)
    for path in ("compiled", "portable"):
        with on(path):
            if encoded is None:
                with pytest.raises(CodecError):
                    codec.encode_difference(values, less, more)
                continue
            left = torch.empty(count)
            data, lost = codec.encode_difference(values, less, more, left, 0.75)
            decoded, stepped = codec.decode(data, count), torch.empty(count)
            codec.subtract_decoded(data, values, rate, stepped)
        assert bytes(data) == encoded
        assert same_bits(left, (x - decoded) * 0.75)
        assert lost == pytest.approx(float(left.double().square().sum()), rel=1e-5) or lost == math.inf
        assert same_bits(stepped, values - decoded * rate)


@fused
def test_a_remainder_may_take_the_place_of_what_was_carried(codec: Codec) -> None:
    values, carried = gaussian(5000), gaussian(5000, 1)
    found = []
    for path in ("compiled", "portable"):
        with on(path):
            found.append(carried.clone())
            codec.encode_difference(values, None, found[-1], found[-1])
    assert same_bits(*found)
    assert not torch.equal(found[0], carried)


@fused
@settings(deadline=None, max_examples=100)
@given(
    numbers=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=300),
    repeats=st.integers(1, 5),
)
@example(numbers=[3.4028234663852886e38, -3.4028234663852886e38], repeats=1)
@example(numbers=[-0.0] * 256, repeats=1)
@example(numbers=[1.1754943508222875e-38, -1.401298464324817e-45], repeats=200)
def test_both_paths_agree_on_numbers_at_the_ends_of_the_range(
    codec: Codec, numbers: list[float], repeats: int
) -> None:
    x = torch.tensor(numbers * repeats, dtype=torch.float32)
    with on("compiled"):
        encoded = encoded_or_refused(codec, x)
    with on("portable"):
        assert encoded_or_refused(codec, x) == encoded


@fused
@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 1 << 32), count=st.integers(1, 600))
def test_both_paths_refuse_the_same_bytes(codec: Codec, seed: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    data = bytearray(codec.encode(gaussian(count, seed)))
    for place in draw.integers(0, len(data), draw.integers(1, 4)):
        data[place] = int(draw.choice([0x00, 0x01, 0x7F, 0x80, 0xFF, int(draw.integers(256))]))
    with on("compiled"):
        first = decoded_or_refused(codec, bytes(data), count)
    with on("portable"):
        second = decoded_or_refused(codec, bytes(data), count)
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert same_bits(first, second)


def test_scales_round_like_bfloat16_and_up_to_the_next_one() -> None:
    x = odd_values(20_000, seed=0)
    x = x[x.abs() < 3e38]
    normal = x.abs() >= scales.SMALLEST
    assert torch.equal(scales.nearest(x)[normal], x.bfloat16().float()[normal])
    up = scales.upwards(x.abs())
    assert bool((up[normal] >= x.abs()[normal]).all())
    assert bool((up[normal] <= x.abs()[normal] * (1 + 2.0**-7)).all())
    assert torch.equal(up, up.bfloat16().float())
    assert torch.equal(scales.unpacked(scales.packed(up).numpy()), up)


def test_threads_share_a_codec() -> None:
    codec, x = codec_by_tag("int8/256"), gaussian(100_000)
    found: list[bytes] = []
    with on("compiled"):
        threads = [threading.Thread(target=lambda: found.append(bytes(codec.encode(x)))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [bytes(codec.encode(x))] * 4


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ENCODE = (
    "import torch; from shoal.compression import kernels; from shoal.compression.registry import codec_for;"
    "print(kernels.warm(), bytes(codec_for('int8', 256).encode(torch.arange(300.0))).hex())"
)


def test_without_numba_the_portable_path_serves() -> None:
    with on("compiled"):
        expected = bytes(codec_by_tag("int8/256").encode(torch.arange(300.0))).hex()
    absent = "import sys; sys.modules['numba'] = None;" + ENCODE
    assert run(absent) == f"False {expected}"
    assert run(ENCODE, NUMBA_DISABLE_JIT="1") == f"False {expected}"


def test_a_cache_that_cannot_be_written_does_not_keep_kernels_from_compiling() -> None:
    assert run(ENCODE, NUMBA_CACHE_DIR="/dev/null/nowhere").startswith("True")


def test_importing_codecs_does_not_import_numba() -> None:
    assert run("import sys, shoal.compression.registry; print('numba' in sys.modules)") == "False"
