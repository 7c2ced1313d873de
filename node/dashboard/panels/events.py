"""What happened, newest first; and what the owner ordered."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from shoal.node.dashboard import words
from shoal.node.dashboard.markup import Markup, tag
from shoal.node.dashboard.panels.card import badge, button, card, empty
from shoal.node.dashboard.state import PageState
from shoal.node.view.parts import EventRow
from shoal.node.view.snapshot import Snapshot

_SHOWN = 60
_PEER_ID = re.compile(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}")
_BAD = ("gone", "lost", "refused", "suspect", "fault", "cut", "dropped", "down", "hung", "disagree")


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
    save = button("JSON", "events-file", "quiet") if state.can("history") else None
    feed = (
        event_list(found[:_SHOWN], snapshot)
        if found
        else empty("No event fits the filter." if needles else "Nothing has happened yet.")
    )
    return card(
        "Events",
        tag("div", search, save, class_="tools"),
        tag("div", feed, class_="feed", tabindex="0", role="region", aria_label="Events"),
    )


def event_list(found: Sequence[EventRow], snapshot: Snapshot) -> Markup:
    names = {peer.peer: peer.name for peer in snapshot.peers}
    return tag("ol", *(_event(event, names) for event in found), class_="events")


def _event(event: EventRow, names: Mapping[str, str]) -> Markup:
    kind = "bad" if any(word in event.kind for word in _BAD) else ""
    told = (
        ""
        if event.text == event.kind
        else _PEER_ID.sub(lambda id_: names.get(id_[0], id_[0][-6:]), event.text)
    )
    name = names.get(event.peer, event.name)  # its first event may have come before its name
    return tag(
        "li",
        tag("time", words.clock(event.at), title=words.day(event.at)),
        badge(event.kind.replace("_", " ").replace("-", " "), kind),
        tag("span", told, tag("small", " " if told else "", name) if name else None),
        data_key=str(event.number),
    )


def orders(snapshot: Snapshot, state: PageState) -> Markup:
    """The audit log."""
    if not state.can("orders"):
        return Markup()
    entries = state.orders.get("orders")
    rows = (
        [_order(entry, state) for entry in entries if isinstance(entry, Mapping)]
        if isinstance(entries, list)
        else []
    )
    return card(
        "Orders given",
        tag("ol", *rows, class_="events") if rows else empty("None yet."),
        note="Each is signed with the owner's key and kept.",
    )


def _order(entry: Mapping[str, object], state: PageState) -> Markup:
    at = entry.get("at_unix_s")
    return tag(
        "li",
        tag("time", words.clock(float(at)) if isinstance(at, int | float) else ""),
        badge(str(entry.get("what", ""))),
        tag(
            "span",
            str(entry.get("text", "")),
            tag("small", f" by {entry.get('who', '')}"),
            _undo(entry) if state.can("order", "unban") else None,
        ),
        data_key=f"order {entry.get('number')}",
    )


def _undo(entry: Mapping[str, object]) -> Markup | None:
    """A ban can be taken back from where it stands; one that was taken back already answers that it was."""
    arguments = entry.get("arguments")
    if entry.get("what") != "ban" or entry.get("refused") or not isinstance(arguments, Mapping):
        return None
    return button("Unban", "ask", "small quiet", what="unban", peer=str(arguments.get("peer", "")))
