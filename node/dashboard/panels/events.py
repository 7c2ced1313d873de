"""What happened, newest first; and what the owner ordered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoal.node.dashboard import words
from shoal.node.dashboard.markup import Markup, tag
from shoal.node.dashboard.panels.card import badge, card, empty
from shoal.node.dashboard.state import PageState
from shoal.node.view.parts import EventRow
from shoal.node.view.snapshot import Snapshot

_SHOWN = 60
_BAD = ("gone", "lost", "refused", "suspect", "fault", "cut", "dropped", "down", "hung")


def events(snapshot: Snapshot, state: PageState) -> Markup:
    """The feed, with a filter over words, kinds and names."""
    needles = state.event_filter.casefold().split()
    found = [
        event
        for event in reversed(snapshot.events)
        if all(needle in f"{event.kind} {event.name} {event.text}".casefold() for needle in needles)
    ]
    search = tag(
        "label",
        tag("span", "Filter events", class_="unseen"),
        tag(
            "input",
            type="search",
            placeholder="Filter by word, kind or peer…",
            data_do="event-filter",
            maxlength=64,
            autocomplete="off",
            spellcheck="false",
        ),
    )
    feed = event_list(found[:_SHOWN]) if found else empty("Nothing happened, or nothing fits the filter.")
    return card(
        "Events",
        tag("div", search, class_="tools"),
        tag("div", feed, class_="feed", tabindex="0", role="region", aria_label="Events"),
    )


def event_list(found: Sequence[EventRow]) -> Markup:
    return tag("ol", *(_event(event) for event in found), class_="events")


def _event(event: EventRow) -> Markup:
    kind = "bad" if any(word in event.kind for word in _BAD) else ""
    return tag(
        "li",
        tag("time", words.clock(event.at), title=words.day(event.at)),
        badge(event.kind.replace("_", " "), kind),
        tag("span", tag("b", event.name, " ") if event.name else None, event.text),
        data_key=str(event.number),
    )


def orders(snapshot: Snapshot, state: PageState) -> Markup:
    """The audit log."""
    if not state.can("orders"):
        return Markup()
    entries = state.orders.get("orders")
    rows = (
        [_order(entry) for entry in entries if isinstance(entry, Mapping)]
        if isinstance(entries, list)
        else []
    )
    return card(
        "Orders given",
        tag("ol", *rows, class_="events") if rows else empty("None yet."),
        note="Each is signed with the owner's key and kept.",
    )


def _order(entry: Mapping[str, object]) -> Markup:
    at = entry.get("at_unix_s")
    return tag(
        "li",
        tag("time", words.clock(float(at)) if isinstance(at, int | float) else ""),
        badge(str(entry.get("what", ""))),
        tag("span", str(entry.get("text", "")), tag("small", f" by {entry.get('who', '')}")),
        data_key=f"order {entry.get('number')}",
    )
