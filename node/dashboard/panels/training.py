"""Loss against tokens, and where the time goes."""

from __future__ import annotations

from shoal.node.dashboard import words
from shoal.node.dashboard.charts import Line, Mark, bar, chart, spark, thinned
from shoal.node.dashboard.markup import Markup, tag
from shoal.node.dashboard.panels.card import card, empty, figure, figures
from shoal.node.dashboard.state import PageState
from shoal.node.view.snapshot import Snapshot

_POINTS = 240
_MARKS = 60


def loss(snapshot: Snapshot, state: PageState) -> Markup:
    """Training and held-out loss; rounds as fine lines, faults as strong ones."""
    train = [(float(p.tokens), p.train) for p in snapshot.loss if p.train is not None]
    held_out = [(float(p.tokens), p.held_out) for p in snapshot.loss if p.held_out is not None]
    lines = [Line("training", "train", thinned(train, _POINTS)), Line("held out", "held-out", held_out)]
    marks = [
        Mark(mark.tokens, _mark_kind(mark.kind), f"{words.clock(mark.at)} {mark.text}")
        for mark in snapshot.markers[-_MARKS:]
    ]
    if state.past is not None:
        then = state.past.snapshot
        marks.append(Mark(then.run.tokens, "then", f"{words.clock(then.at)}, the moment that is shown"))
    last = f"{train[-1][1]:.3f} at {words.number(train[-1][0])} tokens" if train else "nothing yet"
    drawing = chart(
        [line for line in lines if line.points],
        marks,
        f"Loss against tokens; training loss {last}",
        "tokens",
        "nats a token",
        words.number,
        lambda value: f"{value:.3g}",
    )
    faults = sum(mark.kind == "fault" for mark in marks)
    aside = tag("span", words.count(faults, "fault"), class_="legend mark-note") if faults else None
    return card("Loss", drawing, aside=aside)


def _mark_kind(kind: str) -> str:
    return kind if kind in ("round", "order") else "fault"


def throughput(snapshot: Snapshot, state: PageState) -> Markup:
    """Now, the last hour, the best; and what it is lost to."""
    found = snapshot.throughput
    best = max(found.best or 0.0, found.now, found.hour or 0.0) or 1.0
    rows = [
        tag("div", tag("span", name), bar(value / best), tag("b", words.number(value)), class_="bar-row")
        for name, value in (
            ("now", found.now),
            ("hour", found.hour),
            ("best", found.best and max(found.best, found.now)),
        )
        if value is not None
    ]
    lost = [
        tag(
            "li",
            tag("span", one.text or one.what),
            bar(one.share, "warn"),
            tag("b", words.share(one.share)),
            class_="bar-row",
            data_key=one.what,
        )
        for one in found.lost
    ]
    return card(
        "Throughput",
        tag("div", *rows, class_="bars"),
        tag("h3", "Where time is lost"),
        tag("ul", *lost, class_="bars") if lost else empty("Not measured yet."),
        figures(
            figure(
                f"{snapshot.run.learning_rate:.2g}" if snapshot.run.learning_rate else "–", "learning rate"
            ),
            figure(words.number(snapshot.run.inner_steps), "H, inner steps"),
        ),
        _day(state),
        aside=tag("span", "tokens a second", class_="legend"),
    )


def _day(state: PageState) -> Markup | None:
    """The curve that the history has of the last day."""
    if len(state.rates) < 2:
        return None
    begun, ended = words.day(state.rates[0][0])[-5:], words.day(state.rates[-1][0])[-5:]
    curve = spark([rate for _, rate in state.rates], f"Tokens a second from {begun} to {ended}")
    ends = tag("div", tag("span", begun), tag("span", ended), class_="ends")
    return tag("div", curve, ends, class_="day")
