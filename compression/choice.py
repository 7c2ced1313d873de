"""Which codecs to use, as pure functions: a round's by its slowest link, or each layer's by its error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Fastest first: (least uplink in bits per second, contribution, published mean). Neither int8 nor, with error
# feedback, 4 bits cost anything in published runs (INTELLECT-1, arXiv 2412.01152; Streaming DiLoCo, arXiv
# 2501.18512). One bit wants a warm-up, which the caller sees to.
_LADDER = (
    (200e6, "int8", "int8"),
    (100e6, "int4", "int4"),
    (0.0, "onebit", "onebit"),
)


def codec_for_link(
    uplink_bits_per_s: float, encoded_values_per_s: Mapping[str, float] | None = None
) -> tuple[str, str]:
    """The families of (contribution, published mean) for rounds whose slowest uplink is this.

    `encoded_values_per_s` is the speed measured on this machine, by family. A family that encodes more slowly
    than the link carries raw values steps aside for float32, which costs nothing to make.
    """
    speeds = encoded_values_per_s or {}
    raw_values_per_s = uplink_bits_per_s / 32

    def unless_slower(family: str) -> str:
        return "float32" if speeds.get(family, raw_values_per_s) < raw_values_per_s else family

    families = next(families for least, *families in _LADDER if uplink_bits_per_s >= least)
    contribution, published = map(unless_slower, families)
    return contribution, published


@dataclass(frozen=True, slots=True)
class Choice:
    """One codec for one layer, as measured on values of that layer."""

    family: str
    encoded_bytes: int
    squared_error: float  # ‖decoded − values‖²


def allocate_bits(
    layers: Sequence[Sequence[Choice]], most_squared_error: float, steps: int = 4096
) -> list[Choice]:
    """One of the choices of each layer: the fewest bytes whose squared errors sum to at most so much.

    Where even the most exact choices exceed it, those. Dynamic programming over the error spent so far, as in
    L-GreCo (arXiv 2210.17357), in `steps` equal steps. Each choice's error is rounded up to a whole step: the
    budget is kept, and at most a step a layer given away. Of equal bytes, the earlier choice.
    """
    exact = [
        min(choices, key=lambda choice: (choice.squared_error, choice.encoded_bytes)) for choices in layers
    ]
    unit = most_squared_error / steps
    if unit <= 0.0 or _spent(exact, unit) > steps:
        return exact
    # least[e]: fewest bytes of the layers so far within e steps of error; picked[l][e]: by which choice.
    least = np.zeros(steps + 1)
    picked = []
    for choices in layers:
        totals = np.full((len(choices), steps + 1), np.inf)
        for total, choice in zip(totals, choices, strict=True):
            spent = _spent([choice], unit)
            if spent <= steps:
                total[spent:] = least[: steps + 1 - spent] + choice.encoded_bytes
        picked.append(totals.argmin(axis=0))
        least = totals.min(axis=0)
    chosen, left = [], steps
    for choices, by_error in zip(reversed(layers), reversed(picked), strict=True):
        choice = choices[by_error[left]]
        chosen.append(choice)
        left -= _spent([choice], unit)
    return chosen[::-1]


def _spent(choices: Sequence[Choice], unit: float) -> int:
    """Whole steps of error."""
    return sum(int(np.ceil(min(choice.squared_error / unit, 1e9))) for choice in choices)
