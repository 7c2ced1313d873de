"""Figures as people read them: short, with units, "–" for what nobody measured."""

from __future__ import annotations

import time
from collections.abc import Sequence

NOTHING = "–"
_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_BINARY = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def number(value: float | None, digits: int = 3) -> str:
    """1,234 or 1.23 M."""
    if value is None:
        return NOTHING
    if abs(value) < 10_000:
        return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 100 else f"{value:.{digits}g}"
    size, unit = next((size, unit) for size, unit in _SI if abs(value) >= size)
    return f"{value / size:.{digits}g} {unit}" if abs(value) / size < 1000 else f"{value / size:,.0f} {unit}"


def numbers(values: Sequence[int]) -> str:
    return ", ".join(map(number, values)) or NOTHING


def loss(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def rate(tokens_per_s: float | None) -> str:
    return NOTHING if tokens_per_s is None else f"{number(tokens_per_s)} tok/s"


def share(value: float | None) -> str:
    return NOTHING if value is None else f"{value * 100:.1f} %" if value < 0.1 else f"{value * 100:.0f} %"


def size(value: float | None) -> str:
    if value is None:
        return NOTHING
    for factor, unit in _BINARY:
        if value >= factor:
            return (
                f"{value / factor:.3g} {unit}" if value < 1000 * factor else f"{value / factor:,.0f} {unit}"
            )
    return f"{value:,.0f} B"


def bits(bytes_per_s: float | None) -> str:
    if bytes_per_s is None:
        return NOTHING
    value = bytes_per_s * 8
    unit, factor = ("Gbit/s", 1e9) if value >= 1e9 else ("Mbit/s", 1e6) if value >= 1e6 else ("kbit/s", 1e3)
    shown = value / factor
    return f"{shown:.1f} {unit}" if shown < 100 else f"{shown:,.0f} {unit}"


def duration(seconds: float | None) -> str:
    """0.42 s, 12 s, 3 min, 2 h 5 min, 3 d 4 h."""
    if seconds is None:
        return NOTHING
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def milliseconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f} ms" if value < 10 else f"{value:,.0f} ms"


def clock(unix_s: float) -> str:
    """The time of day, here."""
    return time.strftime("%H:%M:%S", time.localtime(unix_s))


def day(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def count(number_of: int, one: str, many: str = "") -> str:
    """1 replica, 2 replicas."""
    return f"{number_of:,} {one if number_of == 1 else many or one + 's'}"
