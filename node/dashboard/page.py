"""The page: panels laid out, redrawn when the feed has something new, and what a person does in them.

One `OwnersPage` per browser tab. It never decides anything: orders go to the daemon, which signs them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nicegui import ui
from nicegui.element import Element
from starlette.requests import Request

from shoal.node.dashboard.deeds import Deeds
from shoal.node.dashboard.feed import Feed
from shoal.node.dashboard.live import Live
from shoal.node.dashboard.markup import Markup
from shoal.node.dashboard.panels import (
    contributors,
    drawer,
    events,
    invitations,
    network,
    overview,
    peers,
    pipeline,
    questions,
    rounds,
    safety,
    scrubber,
    training,
    tryout,
)
from shoal.node.dashboard.state import PageState
from shoal.node.view.snapshot import Snapshot

TICK_S = 0.15
Draw = Callable[[Snapshot, PageState], Markup]

PANELS: tuple[tuple[str, str, Draw], ...] = (  # id, classes, what draws it
    ("verdict", "verdict wide", overview.verdict),
    ("scrubber", "scrubber wide", scrubber.scrubber),
    ("tiles", "tiles wide", overview.tiles),
    ("loss", "card two-thirds", training.loss),
    ("throughput", "card third", training.throughput),
    ("pipeline", "card wide", pipeline.pipeline),
    ("peers", "card wide", peers.peers),
    ("rounds", "card half", rounds.rounds),
    ("links", "card stacked", network.links),
    ("compression", "card stacked", rounds.compression),
    ("churn", "card stacked", network.churn),
    ("checkpoints", "card third", safety.checkpoints),
    ("trust", "card third", safety.trust),
    ("coordinator", "card third", safety.coordinator),
    ("invitations", "card half", invitations.invitations),
    ("tryout", "card half", tryout.tryout),
    ("events", "card half", events.events),
    ("contributors", "card stacked", contributors.contributors),
    ("orders", "card stacked", events.orders),
    ("drawer", "over", drawer.drawer),
    ("questions", "over", questions.dialogs),
)
OF_NOW = frozenset({"scrubber", "loss"})  # draw the run as it is beside the moment that is shown
NOT_KEPT = frozenset({"rounds", "links", "coordinator", "invitations", "tryout", "contributors", "orders"})
_FOLDER = Path(__file__).parent


def build_page(feed: Feed) -> None:
    """Register the page at "/"."""
    style = (_FOLDER / "style.css").read_text()
    theme = (_FOLDER / "theme.js").read_text()

    @ui.page("/", title="Shoal")
    def show(request: Request) -> None:
        ui.add_head_html(f"<style>{style}</style><script>{theme}</script>")
        session: bytes = request.scope["shoal_session"]
        OwnersPage(feed, f"page:{session.hex()[:12]}").build()


class OwnersPage:
    """See the module. `who` stands in the audit log."""

    def __init__(self, feed: Feed, who: str) -> None:
        self._feed = feed
        self._state = PageState()
        self._lives: list[tuple[Live, Callable[[Snapshot | None, PageState], Markup]]] = []
        self._seen: tuple[int, PageState] | None = None
        self._deeds = Deeds(feed, who, lambda: self._state, self._become)

    def build(self) -> None:
        """Empty frames, which the first tick fills: the page's own HTML never holds anybody's text."""
        self._live("header", "top", "top-bar", overview.top_bar)
        self._live("div", "stale", "stale", overview.stale_banner)
        with ui.element("main").classes("panels"):
            beside: Element | None = None  # panels that share a column with what is next to them
            for name, kind, draw in PANELS:
                if "stacked" not in kind:
                    beside = None
                    self._live("section", name, kind, _at_its_time(name, draw))
                    continue
                beside = beside or ui.element("div").classes("beside half")
                with beside:
                    self._live("section", name, kind, _at_its_time(name, draw))
        toast = self._live("div", "toast", "toasts", questions.toast)
        toast.props("role=status")
        ui.timer(TICK_S, self._tick)

    def _live(
        self, kind: str, name: str, classes: str, draw: Callable[[Snapshot | None, PageState], Markup]
    ) -> Live:
        live = Live(kind, self._deeds.did)
        live.props(f"id={name}").classes(classes)
        self._lives.append((live, draw))
        return live

    def _tick(self) -> None:
        self._feed.wanted()
        feed = self._feed
        if self._seen is None or self._seen[0] != feed.looks:
            self._state = replace(
                self._state,
                now=time.time(),
                actions=feed.actions,
                tokens=tuple(feed.tokens),
                orders=feed.orders,
                contributors=tuple(feed.contributors),
                exported=feed.exported,
                rates=tuple((at, rate) for at, rate in feed.rates),
                trouble=feed.trouble,
                span=feed.span,
            )
        self._redraw()

    def _become(self, state: PageState) -> None:
        """A step of the person's: shown at once."""
        self._state = state
        self._redraw()

    def _redraw(self) -> None:
        now = (self._feed.looks, self._state)
        if now == self._seen or not self._feed.looks:
            return
        self._seen = now
        for live, draw in self._lives:
            live.show(draw(self._feed.snapshot, self._state))
        ui.run_javascript("window.shoalAlive?.()")


def _at_its_time(name: str, draw: Draw) -> Callable[[Snapshot | None, PageState], Markup]:
    """Draws the moment that the page shows; nothing where nothing is known of it."""

    def shown(snapshot: Snapshot | None, state: PageState) -> Markup:
        if state.past is not None and name not in OF_NOW:
            snapshot = state.past.snapshot if name not in NOT_KEPT else None
        return draw(snapshot, state) if snapshot is not None else Markup()

    return shown
