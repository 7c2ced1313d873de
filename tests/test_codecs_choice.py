"""The choice of a codec by link."""

from __future__ import annotations

import pytest

from shoal.compression.choice import codec_for_link
from shoal.compression.registry import codec_for


@pytest.mark.parametrize(
    ("megabits_per_s", "family"),
    [
        (0, "onebit"),
        (20, "onebit"),
        (99, "onebit"),
        (100, "int4"),
        (199, "int4"),
        (200, "int8"),
        (10_000, "int8"),
    ],
)
def test_slower_links_get_fewer_bits(megabits_per_s: float, family: str) -> None:
    assert codec_for_link(megabits_per_s * 1e6) == (family, family)
    assert codec_for(family, 256).tag


def test_a_codec_slower_than_the_wire_steps_aside() -> None:
    ten_gigabits = 10e9  # carries 312 million raw values a second
    assert codec_for_link(ten_gigabits, {"int8": 300e6}) == ("float32", "float32")
    assert codec_for_link(ten_gigabits, {"int8": 320e6}) == ("int8", "int8")
    assert codec_for_link(ten_gigabits, {"int4": 1.0}) == ("int8", "int8")
