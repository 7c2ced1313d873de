"""Which codec a round should use: a pure choice by the speed of its slowest link. Called by leaders."""

from __future__ import annotations

from collections.abc import Mapping

# Fastest first: (least uplink in bits per second, contribution, published mean). Neither int8 nor, with error
# feedback, 4 bits cost anything in published runs (OpenDiLoCo, arXiv 2407.07852; Streaming DiLoCo, arXiv
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
