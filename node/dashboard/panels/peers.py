"""The peers table: filtered, sorted, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

from shoal.node.dashboard import words
from shoal.node.dashboard.markup import Child, Markup, tag
from shoal.node.dashboard.panels.card import badge, button, card, empty, table
from shoal.node.dashboard.panels.pipeline import peer_state
from shoal.node.dashboard.state import PEERS_SHOWN, PageState, stage_word
from shoal.node.view.parts import Peer
from shoal.node.view.snapshot import Snapshot

Key = Callable[[Peer], float | str | None]


@dataclass(frozen=True, slots=True)
class Column:
    """One column: what it is called, what it sorts by, what it shows, what stands in the CSV."""

    name: str
    title: str
    key: Key
    show: Callable[[Peer], Child]
    numeric: bool = True


def _plain(name: str, title: str, key: Key) -> Column:
    return Column(name, title, key, lambda peer: str(key(peer) or "–"), numeric=False)


COLUMNS = (
    Column("name", "Name", lambda p: p.name.casefold(), lambda p: _name(p), numeric=False),
    Column("stage", "Stage", lambda p: stage_word(p.stages), lambda p: stage_word(p.stages)),
    Column("state", "State", lambda p: peer_state(p), lambda p: _state(p), numeric=False),
    Column("rate", "tok/s", lambda p: p.tokens_per_s, lambda p: words.number(p.tokens_per_s)),
    Column("round", "Round", lambda p: p.height, lambda p: words.numbers(p.heights)),
    Column("busy", "Busy", lambda p: p.busy_share, lambda p: words.share(p.busy_share)),
    Column("up", "Up", lambda p: p.up_bytes_per_s, lambda p: words.bits(p.up_bytes_per_s)),
    Column("down", "Down", lambda p: p.down_bytes_per_s, lambda p: words.bits(p.down_bytes_per_s)),
    Column("rtt", "RTT", lambda p: p.rtt_ms, lambda p: words.milliseconds(p.rtt_ms)),
    Column("accepted", "Accepted", lambda p: p.micro_batches, lambda p: words.number(p.micro_batches)),
    Column("rejected", "Rejected", lambda p: p.rejected, lambda p: words.number(p.rejected)),
    Column("uptime", "Uptime", lambda p: p.uptime_s, lambda p: words.duration(p.uptime_s)),
    _plain("device", "Device", lambda p: p.device),
    _plain("version", "Version", lambda p: p.version),
)
_BY_NAME = {column.name: column for column in COLUMNS}


def peers(snapshot: Snapshot, state: PageState) -> Markup:
    """The panel."""
    found = chosen(snapshot, state)
    shown = found if state.all_peers else found[:PEERS_SHOWN]
    rows = [
        tag(
            "tr",
            *(_cell(column, peer) for column in COLUMNS),
            data_key=peer.peer,
            class_=f"is-{peer_state(peer)}",
        )
        for peer in shown
    ]
    tools = tag(
        "div",
        tag(
            "label",
            tag("span", "Filter peers", class_="unseen"),
            tag(
                "input",
                type="search",
                placeholder="Filter by name, stage, state, device…",
                data_do="filter",
                maxlength=64,
                autocomplete="off",
                spellcheck="false",
            ),
        ),
        button("CSV", "csv", "quiet"),
        class_="tools",
    )
    more = len(found) - len(shown)
    return card(
        "Peers",
        tools,
        table([_head(column, state) for column in COLUMNS], rows, "Peers of the run"),
        empty("No peer fits the filter." if state.filter else "Nobody yet.") if not rows else None,
        button(f"Show {more} more", "all-peers", "quiet") if more else None,
        aside=tag("span", f"{len(found)} of {len(snapshot.peers)}", class_="legend"),
    )


def chosen(snapshot: Snapshot, state: PageState) -> list[Peer]:
    """Those that fit the filter, in the order asked for; who has no figure comes last."""
    needles = state.filter.casefold().replace("stage ", "stage-").split()
    found = [peer for peer in snapshot.peers if all(needle in _haystack(peer) for needle in needles)]
    key = _BY_NAME.get(state.sort, _BY_NAME["stage"]).key
    known = sorted((peer for peer in found if key(peer) is not None), key=lambda peer: peer.peer)
    known.sort(key=lambda peer: _order(key(peer)), reverse=state.descending)
    return known + [peer for peer in found if key(peer) is None]


def _order(value: float | str | None) -> tuple[float, str]:
    return (0.0, value) if isinstance(value, str) else (value or 0.0, "")


def as_csv(snapshot: Snapshot, state: PageState) -> str:
    """The same rows for a spreadsheet. A text that one would take for a formula is quoted."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["peer", *(column.name for column in COLUMNS)])
    for peer in chosen(snapshot, state):
        writer.writerow([peer.peer, *(_harmless(column.key(peer)) for column in COLUMNS)])
    return out.getvalue()


def _harmless(value: float | str | None) -> float | str:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return "" if value is None else value


def _haystack(peer: Peer) -> str:
    told = (peer.name, peer.peer, peer_state(peer), peer.device, peer.version, *peer.roles)
    return " ".join((*told, *(f"stage-{stage}" for stage in peer.stages))).casefold()


def _head(column: Column, state: PageState) -> Markup:
    sorting = column.name == state.sort
    order = ("descending" if state.descending else "ascending") if sorting else None
    arrow = tag("span", "▾" if state.descending else "▴", aria_hidden="true") if sorting else None
    press = tag("button", column.title, arrow, type="button", data_do="sort", data_column=column.name)
    return tag("th", press, scope="col", aria_sort=order, class_="number" if column.numeric else None)


def _cell(column: Column, peer: Peer) -> Markup:
    if column.name == "name":
        return tag("th", column.show(peer), scope="row")
    return tag("td", column.show(peer), class_="number" if column.numeric else None)


def _name(peer: Peer) -> Markup:
    press = tag("button", peer.name, type="button", class_="link", data_do="peer", data_peer=peer.peer)
    return tag("span", press, badge("owner") if "owner" in peer.roles else None)


def _state(peer: Peer) -> Markup:
    state = peer_state(peer)
    return tag(
        "span",
        tag("i", class_=f"dot cell-{state}", aria_hidden="true"),
        state,
        class_="state",
        title=peer.reason or None,
    )
