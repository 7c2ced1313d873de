"""Charts as SVG: pure functions of figures. Called by the panels.

Lines keep their width and texts their size at any width of the page, since the drawing is stretched
(`preserveAspectRatio="none"`) and the texts lie over it as HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.node.dashboard.markup import Markup, tag

WIDE, HIGH = 1000, 300  # of the drawing, before it is stretched
Point = tuple[float, float]
Formatter = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Line:
    """One curve. `kind` is a class of the style sheet."""

    name: str
    kind: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line at `x`, with words for whoever points at it."""

    x: float
    kind: str
    words: str


def chart(
    lines: Sequence[Line],
    marks: Sequence[Mark],
    label: str,
    x_word: str,
    y_word: str,
    x_text: Formatter,
    y_text: Formatter,
) -> Markup:
    """Curves over a common x, with a grid; `label` says it all to whoever cannot see it."""
    points = [point for line in lines for point in line.points]
    if len(points) < 2:
        return tag("p", "The curve begins with the first inner steps.", class_="empty")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right = min(xs), max(max(xs), min(xs) + 1e-9)
    ticks = nice_ticks(min(ys), max(ys), 4)
    low, high = ticks[0], ticks[-1]

    def place(point: Point) -> str:
        x, y = point
        return f"{(x - left) / (right - left) * WIDE:.1f},{(high - y) / (high - low) * HIGH:.1f}"

    def x_share(x: float) -> float:
        return (x - left) / (right - left)

    grid = [
        tag("line", x1=0, x2=WIDE, y1=y, y2=y, class_="grid")
        for y in (round((high - tick) / (high - low) * HIGH, 1) for tick in ticks)
    ]
    rules = [
        tag("line", tag("title", mark.words), x1=x, x2=x, y1=0, y2=HIGH, class_=f"mark {mark.kind}")
        for mark in marks
        if left <= mark.x <= right
        for x in (round(x_share(mark.x) * WIDE, 1),)
    ]
    curves = [
        tag("polyline", points=" ".join(map(place, line.points)), class_=f"curve {line.kind}")
        for line in lines
        if line.points
    ]
    drawing = tag(
        "svg",
        *grid,
        *rules,
        *curves,
        viewBox=f"0 0 {WIDE} {HIGH}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )
    y_texts = [
        tag("span", y_text(tick), style=f"top:{(high - tick) / (high - low) * 100:.2f}%") for tick in ticks
    ]
    x_ticks = [tick for tick in nice_ticks(left, right, 4) if left <= tick <= right]
    x_texts = [tag("span", x_text(tick), style=f"left:{x_share(tick) * 100:.2f}%") for tick in x_ticks]
    return tag(
        "div",
        tag("div", tag("span", y_word, class_="axis-word"), legend(lines), class_="chart-head"),
        tag("div", *y_texts, class_="y-axis", aria_hidden="true"),
        tag("div", drawing, class_="plot"),
        tag("div", *x_texts, class_="x-axis", aria_hidden="true"),
        tag("div", x_word, class_="axis-word x-word"),
        class_="chart",
    )


def legend(lines: Sequence[Line]) -> Markup:
    return tag(
        "span",
        *(tag("span", tag("i", class_=f"swatch {line.kind}"), line.name, class_="key") for line in lines),
        class_="legend",
    )


def spark(values: Sequence[float], label: str, low: float = 0.0) -> Markup:
    """A small curve without axes, from `low` up."""
    if len(values) < 2:
        return Markup()
    span = max(values) - low or 1.0
    step = 100 / (len(values) - 1)
    places = [
        f"{index * step:.1f},{28 - (value - low) / span * 26:.1f}" for index, value in enumerate(values)
    ]
    return tag(
        "svg",
        tag("path", d=f"M0,28 L{' L'.join(places)} L100,28 Z", class_="area"),
        tag("polyline", points=" ".join(places), class_="curve train"),
        viewBox="0 0 100 28",
        preserveAspectRatio="none",
        class_="spark",
        role="img",
        aria_label=label,
    )


def bar(share: float, kind: str = "", label: str = "") -> Markup:
    """A horizontal bar, `share` of its width full."""
    width = f"width:{min(1.0, max(0.0, share)) * 100:.1f}%"
    return tag(
        "div",
        tag("i", style=width),
        class_=f"bar {kind}",
        role="img",
        aria_label=label or None,
        aria_hidden=None if label else "true",
    )


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers around [low, high], some `about` of them, two at least."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many of them, the last among them."""
    stride = max(1, math.ceil(len(points) / most))
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]
