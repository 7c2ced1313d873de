"""Who reaches whom how well, and how people come and go."""

from __future__ import annotations

from shoal.node.dashboard import words
from shoal.node.dashboard.markup import Markup, tag
from shoal.node.dashboard.panels.card import card, empty, figure, figures
from shoal.node.dashboard.state import PageState
from shoal.node.view.parts import Link
from shoal.node.view.snapshot import Snapshot

MATRIX_PEERS = 24
_STEPS = 5  # shades, by latency
_NAME_CHARACTERS = 12


def links(snapshot: Snapshot, state: PageState) -> Markup:
    """A matrix: rows measured their way to columns."""
    if not snapshot.links:
        return card("Links", empty("Peers measure their ways to each other as they work together."))
    names = {peer.peer: peer.name for peer in snapshot.peers}
    ends = {link.source for link in snapshot.links} | {link.target for link in snapshot.links}
    order = [peer.peer for peer in snapshot.peers if peer.peer in ends][:MATRIX_PEERS]
    cells = {(link.source, link.target): link for link in snapshot.links}
    worst = max((link.rtt_ms or 0.0 for link in snapshot.links), default=0.0) or 1.0
    heads = [tag("th", tag("span", _short(names[peer])), scope="col", title=names[peer]) for peer in order]
    rows = [
        tag(
            "tr",
            tag("th", _short(names[source]), scope="row", title=names[source]),
            *(_cell(cells.get((source, target)), source == target, worst) for target in order),
            data_key=source,
        )
        for source in order
    ]
    caption = "Round trips in ms, from the row's peer to the column's"
    corner = tag("td", tag("span", "ms", aria_hidden="true"))
    inner = tag(
        "table",
        tag("caption", caption, class_="unseen"),
        tag("thead", tag("tr", corner, *heads)),
        tag("tbody", *rows),
        class_="matrix",
    )
    left_out = snapshot.links_left_out + sum(
        link.source not in order or link.target not in order for link in snapshot.links
    )
    more = f" {left_out} links left out." if left_out else ""
    return card(
        "Links",
        tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption),
        note=f"Round trip in ms, row to column; the stronger the colour, the slower.{more}",
    )


def _cell(link: Link | None, own: bool, worst: float) -> Markup:
    if own or link is None:
        return tag("td", "" if own else "·", class_="none")
    title = f"{words.milliseconds(link.rtt_ms)}, {words.bits(link.bytes_per_s)}"
    title += f", {words.count(link.failures, 'failed call')}" if link.failures else ""
    shade = min(_STEPS - 1, int((link.rtt_ms or 0.0) / worst * _STEPS))
    shown = (
        "–" if link.rtt_ms is None else f"{link.rtt_ms:.0f}" if link.rtt_ms >= 10 else f"{link.rtt_ms:.1f}"
    )
    failed = tag("sup", "!", class_="bad") if link.failures else None
    return tag("td", shown, failed, title=title, class_=f"shade-{shade}")


def _short(name: str) -> str:
    return name if len(name) <= _NAME_CHARACTERS else f"{name[: _NAME_CHARACTERS - 1]}…"


def churn(snapshot: Snapshot, state: PageState) -> Markup:
    """The last hour."""
    found = snapshot.churn
    return card(
        "Churn",
        figures(
            figure(words.number(found.joins), "joined"),
            figure(words.number(found.leaves), "left"),
            figure(words.duration(found.median_session_s), "median session"),
            figure(words.number(found.reroutes), "reroutes"),
            figure(words.duration(found.reroute_p50_s), "to reroute, p50"),
            figure(words.duration(found.reroute_p95_s), "to reroute, p95"),
            figure(words.share(found.redone_share), "work redone"),
        ),
        aside=tag("span", "last hour", class_="legend"),
    )
