"""The choice of a codec by link, and of one for each layer under an error budget."""

from __future__ import annotations

import itertools

import pytest
import torch
from codecs_world import gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.compression.choice import Choice, allocate_bits, codec_for_link
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


def measured(values: torch.Tensor) -> list[Choice]:
    choices = []
    for family in ("float32", "int8", "int4", "onebit"):
        codec = codec_for(family, 256)
        error = codec.decode(codec.encode(values), values.numel()) - values
        choices.append(Choice(family, codec.encoded_bytes(values.numel()), float(error.square().sum())))
    return choices


def test_layers_that_matter_more_get_more_bits() -> None:
    large, small = gaussian(1 << 14), gaussian(1 << 14, seed=1) * 1e-3
    budget = (0.05 * float(large.norm())) ** 2
    assert [choice.family for choice in allocate_bits([measured(large), measured(small)], budget)] == [
        "int8",
        "onebit",
    ]


choices = st.builds(
    Choice,
    st.sampled_from("abcd"),
    st.integers(1, 1000),
    st.floats(0.0, 10.0).map(lambda error: round(error, 3)),
)


@settings(deadline=None, max_examples=200)
@given(layers=st.lists(st.lists(choices, min_size=1, max_size=4), max_size=5), budget=st.floats(0.0, 30.0))
def test_an_allocation_keeps_the_budget_and_is_as_small_as_any_with_a_little_less(
    layers: list[list[Choice]], budget: float
) -> None:
    chosen = allocate_bits(layers, budget)
    assert all(choice in options for choice, options in zip(chosen, layers, strict=True))
    error = sum(choice.squared_error for choice in chosen)
    if error > budget * (1 + 1e-9):
        assert error == pytest.approx(sum(min(c.squared_error for c in options) for options in layers))
    given_away = budget * (len(layers) + 1) / 4096
    for other in itertools.product(*layers):
        if sum(choice.squared_error for choice in other) <= budget - given_away:
            assert sum(c.encoded_bytes for c in chosen) <= sum(c.encoded_bytes for c in other)
