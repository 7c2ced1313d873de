"""The way back through the run: a slider over its history, and the banner that says what is not live.

Its parts have keys: the slider stays the same element while it is dragged, whatever comes above it.
"""

from __future__ import annotations

from shoal.node.dashboard import words
from shoal.node.dashboard.markup import Markup, join, tag
from shoal.node.dashboard.panels.card import button
from shoal.node.dashboard.state import PageState, Past
from shoal.node.view.snapshot import Snapshot

DAY_S = 86400.0
WINDOWS = ((3600.0, "1 h"), (6 * 3600.0, "6 h"), (DAY_S, "1 d"), (7 * DAY_S, "1 w"), (90 * DAY_S, "all"))
SHORTEST_S = 20.0  # of a history that there is anything to look back at
STEPS = 1000  # of the slider
_FAULTS = 60
_HIGH = 28  # of the curve, before it is stretched


def scrubber(snapshot: Snapshot, state: PageState) -> Markup:
    """Nothing where no history is kept. `snapshot`: of now."""
    past, known = state.past, state.span
    if known is None or known[1] - known[0] < SHORTEST_S:
        return Markup()
    left, until, step = reach(state)
    at = past.snapshot.at if past is not None else until
    short = words.day if until - left > DAY_S else words.clock
    title = tag("h2", "History")
    slider = tag(
        "input",
        type="range",
        min=f"{left:.0f}",
        max=f"{until:.0f}",
        step=step,
        value=f"{at:.0f}",
        data_key="slider",
        data_do="moment",
        aria_label="Moment of the run",
        aria_valuetext="now" if past is None else words.day(at),
    )
    return join(
        [
            None if past is None else _as_of(past, state.now),
            tag("div", title, _windows(state, until - known[0]), class_="scrub-head", data_key="head"),
            tag("div", _curve(snapshot, state, left, until), slider, class_="track", data_key="track"),
            tag(
                "div",
                tag("span", short(left)),
                tag("span", "now" if past is None else short(until)),
                class_="ends",
                data_key="ends",
            ),
        ]
    )


def reach(state: PageState) -> tuple[float, float, int]:
    """Both ends of the slider, Unix seconds, and its step. The right one: now, or when looking back began."""
    until = state.past.until if state.past is not None else state.now
    left = until - state.window_s
    left = left if state.span is None else max(left, state.span[0])
    return left, until, max(1, round((until - left) / STEPS))


def _as_of(past: Past, now: float) -> Markup:
    """What is shown is not live; the steps beside it, and the way back."""
    at = past.snapshot.at
    when = words.clock(at) if now - at < DAY_S else words.day(at)
    steps = (
        tag(
            "button",
            word,
            type="button",
            class_="button small",
            data_do="moment",
            data_at=moment,
            disabled=moment is None,
        )
        for word, moment in (("← Earlier", past.before), ("Later →", past.after))
    )
    return tag(
        "div",
        tag(
            "p",
            tag("b", f"As of {when}, not live"),
            tag("small", f"{words.duration(now - at)} ago"),
            role="status",
        ),
        tag("div", *steps, button("Back to live", "live", "go small"), class_="buttons"),
        class_="as-of",
        data_key="as-of",
    )


def _windows(state: PageState, kept_s: float) -> Markup | None:
    """How far back; none that shows no more than a shorter one."""
    shorter = (0.0, *(seconds for seconds, _ in WINDOWS))
    fit = [one for one, less in zip(WINDOWS, shorter, strict=False) if less < kept_s]
    shown = (
        tag(
            "button",
            word,
            type="button",
            class_="button quiet small",
            data_do="window",
            data_seconds=f"{seconds:.0f}",
            aria_pressed=str(seconds == state.window_s).lower(),
        )
        for seconds, word in fit
    )
    return (
        tag("div", *shown, class_="windows", role="group", aria_label="How far back")
        if len(fit) > 1
        else None
    )


def _curve(snapshot: Snapshot, state: PageState, left: float, until: float) -> Markup:
    """Tokens a second over that time, and the faults in it."""
    wide = max(1e-9, until - left)
    known = state.past.curve if state.past is not None else state.rates
    points = [(at, rate) for at, rate in known if left <= at <= until]
    top = max((rate for _, rate in points), default=0.0) or 1.0
    places = " ".join(
        f"{100 * (at - left) / wide:.2f},{_HIGH * (1 - 0.9 * rate / top):.2f}" for at, rate in points
    )
    faults = [
        mark for mark in snapshot.markers if left <= mark.at <= until and mark.kind not in ("order", "round")
    ]
    ticks = (
        tag(
            "i",
            style=f"left:{100 * (mark.at - left) / wide:.2f}%",
            title=f"{words.clock(mark.at)} {mark.text}",
        )
        for mark in faults[-_FAULTS:]
    )
    drawing = tag(
        "svg",
        tag("polyline", points=places, class_="curve train"),
        viewBox=f"0 0 100 {_HIGH}",
        preserveAspectRatio="none",
        role="img",
        aria_label="Tokens a second over this time",
    )
    return tag("div", drawing, *ticks, class_="over-time")
