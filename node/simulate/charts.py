"""Plots as SVG text: lines over time, a strip for each stage, bars. Numbers in, markup out, for `report`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 880, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 28
_TICKS = 5
COLOURS = ("#0b6e99", "#c4622d", "#6b7a3a", "#7b4f9d")
_PALE, _DARK = (244, 236, 224), (11, 110, 153)


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: (x, y) in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


def lines(curves: Sequence[Line], title: str) -> str:
    """Curves over seconds, from zero up."""
    x_most = max((x for curve in curves for x, _ in curve.points), default=1.0)
    y_most = round_up(max((y for curve in curves for _, y in curve.points), default=1.0))
    body = [_axes(x_most, y_most)]
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{_x(x, x_most):.1f},{_y(y, y_most):.1f}" for x, y in curve.points)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        body.append(_text(_LEFT + 8 + 190 * number, _TOP + 10, curve.name, colour=colour))
    return _svg(body, HEIGHT, title)


def strips(rows: Sequence[Sequence[float]], x_most: float, marked: Sequence[int], title: str) -> str:
    """A strip for each row of values in [0, 1], dark for high; `marked`: the row to mark in each column."""
    row_height = max(6.0, min(22.0, 320.0 / max(len(rows), 1)))
    height = _TOP + row_height * len(rows) + _BOTTOM
    columns = max((len(row) for row in rows), default=0)
    width = (WIDTH - _LEFT - _RIGHT) / max(columns, 1)
    body = []
    for number, row in enumerate(rows):
        top = _TOP + number * row_height
        if row_height >= 10 or number % 4 == 0:
            body.append(_text(_LEFT - 6, top + row_height / 2 + 4, str(number), anchor="end"))
        for column, value in enumerate(row):
            left = _LEFT + column * width
            body.append(_box(left, top, width + 0.3, row_height - 1, _shade(value)))
            if marked[column] == number:
                body.append(_box(left, top + row_height - 3, width + 0.3, 2, COLOURS[1]))
    body += [
        _text(
            _x(x_most * tick / _TICKS, x_most),
            height - 8,
            f"{x_most * tick / _TICKS:,.0f} s",
            anchor="middle",
        )
        for tick in range(_TICKS + 1)
    ]
    return _svg(body, height, title)


def bars(values: Sequence[tuple[str, float, str]], title: str) -> str:
    """Horizontal bars: (name, length, what is written behind it)."""
    row_height = 24
    most = max((value for _, value, _ in values), default=1.0) or 1.0
    body = []
    for number, (name, value, told) in enumerate(values):
        top = _TOP + number * row_height
        length = (WIDTH - 360) * value / most
        body.append(_text(150, top + 15, name, anchor="end"))
        body.append(_box(160, top + 3, max(length, 1.0), row_height - 8, COLOURS[0]))
        body.append(_text(166 + length, top + 15, told))
    return _svg(body, _TOP + row_height * len(values) + 6, title)


def round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, 20, ... for the end of an axis."""
    if value <= 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1.0, 2.0, 5.0, 10.0) if value <= step * power * (1 + 1e-9))


def _axes(x_most: float, y_most: float) -> str:
    found = []
    for tick in range(_TICKS + 1):
        x, y = x_most * tick / _TICKS, y_most * tick / _TICKS
        found.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{_y(y, y_most):.1f}" y2="{_y(y, y_most):.1f}" '
            'stroke="#ddd5c8"/>'
        )
        found.append(_text(_LEFT - 6, _y(y, y_most) + 4, f"{y:.3g}", anchor="end"))
        found.append(_text(_x(x, x_most), HEIGHT - 8, f"{x:,.0f} s", anchor="middle"))
    return "".join(found)


def _x(x: float, most: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * x / (most or 1.0)


def _y(y: float, most: float) -> float:
    return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * y / (most or 1.0)


def _shade(value: float) -> str:
    share = min(max(value, 0.0), 1.0)
    mixed = (round(pale + share * (dark - pale)) for pale, dark in zip(_PALE, _DARK, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#4a453d") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _svg(body: Sequence[str], height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(body)}</svg>"
    )
