"""Uplinks as weights: what a peer claims of its own, and what a group makes of its members' claims. Pure.

Part owners are drawn in proportion to uplinks, and an owner keeps the residuals of its parts from round to
round; so what is claimed holds still while measurements wobble, and changes when the line does. The trainer
calls `claimed_uplink`, `neighbours` calls `group_uplinks`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

UNKNOWN = 0.0
_STICKS = 0.85  # in powers of two; see `claimed_uplink`
_MOST_CLAIMED = 2.0**39  # bytes a second
_MOST_OVER_MEDIAN = 8.0


def claimed_uplink(measured_bytes_per_s: float | None, before_bytes_per_s: float) -> float:
    """What a peer says of its uplink: the nearest power of two (bytes a second), kept while it about fits.

    `before_bytes_per_s`: its last claim, UNKNOWN at first. Rounding is off by up to a factor of √2, and a
    measurement that wobbles by 10 % either way differs from the first by up to 1.1/0.9; the claim sticks
    while it is off by less than a little more than both (2^0.79), so such a wobble never changes it.
    """
    if measured_bytes_per_s is None:
        return before_bytes_per_s
    exponent = math.log2(min(max(measured_bytes_per_s, 1.0), _MOST_CLAIMED))
    if before_bytes_per_s > UNKNOWN and abs(exponent - math.log2(before_bytes_per_s)) < _STICKS:
        return before_bytes_per_s
    return 2.0 ** round(exponent)


def group_uplinks(claimed_bytes_per_s: Sequence[float]) -> list[float]:
    """What each member's uplink counts as, in bytes a second, powers of two; all 1 while nobody's is known.

    UNKNOWN counts as the median of the known ones, so that a newcomer owns neither nothing nor everything.
    Nobody counts more than 8 times the median: beyond that a round hardly gets faster, and whoever boasts
    would own nearly all.
    """
    known = [_nearest(claim) for claim in claimed_bytes_per_s if claim > UNKNOWN]
    if not known:
        return [1.0] * len(claimed_bytes_per_s)
    median = statistics.median_low(known)
    return [
        min(_nearest(claim), _MOST_OVER_MEDIAN * median) if claim > UNKNOWN else median
        for claim in claimed_bytes_per_s
    ]


def _nearest(claim: float) -> float:
    """A claim is one already, unless its maker keeps to other rules."""
    return 2.0 ** round(math.log2(claim))
