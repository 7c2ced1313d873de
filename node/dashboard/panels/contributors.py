"""Who has done how much, as far as the coordinator's history goes back."""

from __future__ import annotations

from collections.abc import Mapping

from shoal.node.dashboard import words
from shoal.node.dashboard.charts import bar
from shoal.node.dashboard.markup import Markup, tag
from shoal.node.dashboard.panels.card import card, empty, table
from shoal.node.dashboard.state import PageState
from shoal.node.view.snapshot import Snapshot

SHOWN = 30


def contributors(snapshot: Snapshot, state: PageState) -> Markup:
    """A row for each peer that ever pushed its counters here."""
    rows = [row for row in state.contributors if isinstance(row.get("peer"), str)][:SHOWN]
    if not rows:
        return card(
            "Contributors", empty("Whoever does work is listed here, for as long as the history goes back.")
        )
    most = max(_figure(row, "tokens") for row in rows) or 1.0
    heads = [
        "Name",
        *(tag("th", name, scope="col", class_="number") for name in ("Tokens", "Accepted", "Uptime")),
    ]
    return card(
        "Contributors", table([*heads, "Last heard"], [_row(row, most) for row in rows], "Contributors")
    )


def _row(row: Mapping[str, object], most: float) -> Markup:
    tokens = _figure(row, "tokens")
    return tag(
        "tr",
        tag("th", str(row.get("name") or row["peer"]), bar(tokens / most), scope="row"),
        tag("td", words.number(tokens), class_="number"),
        tag("td", words.number(_figure(row, "micro_batches")), class_="number"),
        tag("td", words.duration(_figure(row, "uptime_s")), class_="number"),
        tag("td", words.day(_figure(row, "last_at"))),
        data_key=str(row["peer"]),
    )


def _figure(row: Mapping[str, object], name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
