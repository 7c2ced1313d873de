"""Reads the quantities people write on a command line: 7d, 12GiB, 20Mbit. Raises UsageError.

Rates are also written that way, for `shoal status`.
"""

from __future__ import annotations

import re

from shoal.protocol.errors import UsageError

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_BYTES = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def duration_s(text: str) -> float:
    """Seconds of 90s, 15m, 12h, 7d or 2w."""
    number, unit = _split(text, "a duration like 12h or 7d")
    if unit not in _SECONDS:
        raise UsageError(f"{text!r} is not a duration like 90s, 12h or 7d")
    return number * _SECONDS[unit]


def size_bytes(text: str) -> int:
    """Bytes of 12GiB, 500MB or 4G."""
    number, unit = _split(text, "a size like 12GiB")
    factor = _BINARY.get(unit.removesuffix("b")) or _BYTES.get(unit.removesuffix("b") or unit)
    if factor is None:
        raise UsageError(f"{text!r} is not a size like 500MB or 12GiB")
    return int(number * factor)


def rate_bytes_per_s(text: str) -> float:
    """Bytes a second of 20Mbit or 1Gbit."""
    number, unit = _split(text, "a rate like 20Mbit")
    unit = unit.removesuffix("/s").removesuffix("ps")
    if unit not in _BITS:
        raise UsageError(f"{text!r} is not a rate like 20Mbit or 1Gbit")
    return number * _BITS[unit] / 8


def rate_text(bytes_per_s: float) -> str:
    """A rate as people write it: 20 Mbit/s."""
    bits_per_s = bytes_per_s * 8
    unit, size = ("Gbit", 1e9) if bits_per_s >= 1e9 else ("Mbit", 1e6) if bits_per_s >= 1e6 else ("kbit", 1e3)
    return f"{bits_per_s / size:.3g} {unit}/s"


def socket_address(text: str) -> tuple[str, int]:
    """Host and port of 127.0.0.1:9100, [::1]:9100, or 9100 alone, which is on loopback."""
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise UsageError(f"{text!r} is not an address like 127.0.0.1:9100")
    return host.removeprefix("[").removesuffix("]") or "127.0.0.1", int(port)


def _split(text: str, wanted: str) -> tuple[float, str]:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z/]*)\s*", text)
    if found is None:
        raise UsageError(f"{text!r} is not {wanted}")
    return float(found[1]), found[2].lower()
