"""The pipeline map: stages as columns, replicas as cells filled by their rate; what moved glides there."""

from __future__ import annotations

from dataclasses import replace

from shoal.node.dashboard import words
from shoal.node.dashboard.charts import bar
from shoal.node.dashboard.markup import Markup, tag
from shoal.node.dashboard.panels.card import badge, card, empty
from shoal.node.dashboard.state import PageState, replicas_word
from shoal.node.view.parts import EventRow, Peer, Stage
from shoal.node.view.snapshot import Snapshot

MOVES = ("moving", "move-cut")
_MOVES_SHOWN = 3
COMPACT = 10  # more replicas than this in a stage: cells without words
_STATES = ("online", "joining", "draining", "suspect", "gone", "observing")
_SIGNS = {"online": "", "joining": "↗", "draining": "↘", "suspect": "!", "gone": "×", "observing": "◦"}


def pipeline(snapshot: Snapshot, state: PageState) -> Markup:
    """All of it."""
    if not snapshot.stages:
        return card("Pipeline", empty("Stages appear here once this peer knows the run."))
    top = max((peer.tokens_per_s for peer in snapshot.peers), default=0.0) or 1.0
    columns = [_column(stage, snapshot, top) for stage in snapshot.stages]
    outside = [peer for peer in snapshot.peers if not peer.stages]
    if outside:
        cells = tag("div", *(_cell(peer, top, len(outside) > COMPACT) for peer in outside), class_="cells")
        head = tag("header", tag("h3", "No stage"), tag("p", words.count(len(outside), "peer")))
        columns.append(tag("section", head, cells, class_="stage outside", data_key="outside"))
    moves = [event for event in snapshot.events if event.kind in MOVES][-_MOVES_SHOWN:]
    present = [name for name in _STATES if any(peer_state(peer) == name for peer in snapshot.peers)]
    keys = (tag("span", tag("i", class_=f"swatch cell-{name}"), name, class_="key") for name in present)
    return card(
        "Pipeline",
        tag(
            "div",
            *columns,
            class_="map",
            style=f"--stages:{len(columns)}",
            tabindex="0",
            role="region",
            aria_label="Stages and their replicas",
        ),
        tag("ul", *(_move(event) for event in moves), class_="moves") if moves else None,
        aside=tag("span", *keys, class_="legend"),
    )


def _move(event: EventRow) -> Markup:
    return tag(
        "li", tag("time", words.clock(event.at)), tag("b", event.name), event.text, data_key=str(event.number)
    )


def peer_state(peer: Peer) -> str:
    """One word for its colour: what others see of it goes before what it says."""
    return peer.state if peer.liveness == "alive" else peer.liveness


def _column(stage: Stage, snapshot: Snapshot, top: float) -> Markup:
    peers = [_at(stage.stage, peer) for peer in snapshot.peers if stage.stage in peer.stages]
    peers.sort(key=lambda peer: peer.peer)  # cells keep their places while rates change
    compact = len(peers) > COMPACT
    layers = f"layers {stage.layers[0]}–{stage.layers[1]}" if stage.layers else ""
    head = tag(
        "header",
        tag("h3", f"Stage {stage.stage}", badge("weakest", "warn") if stage.weakest else None),
        tag("p", layers),
    )
    foot = tag(
        "footer",
        tag("p", tag("b", replicas_word(stage.replicas), class_="bad" if not stage.replicas else None)),
        tag("p", f"{words.rate(stage.tokens_per_s)}, round {stage.height}"),
        bar(
            stage.balance,
            "" if stage.balance > 0.8 else "warn",
            f"{stage.balance:.0%} of the strongest stage",
        )
        if stage.balance is not None
        else None,
        tag("p", f"{words.count(stage.guardians, 'copy', 'copies')} elsewhere"),
        tag("p", "replicas disagree", class_="bad") if stage.heads_equal is False else None,
    )
    cells = tag("div", *(_cell(peer, top, compact) for peer in peers), class_="cells")
    kind = "stage weakest" if stage.weakest else "stage"
    return tag("section", head, cells, foot, class_=kind, data_key=f"stage {stage.stage}")


def _at(stage: int, peer: Peer) -> Peer:
    """What a peer is and does at one of its stages."""
    held = next((held for held in peer.held if held.stage == stage), None)
    return replace(peer, state=held.state, tokens_per_s=held.tokens_per_s) if held else peer


def _cell(peer: Peer, top: float, compact: bool) -> Markup:
    state = peer_state(peer)
    share = min(1.0, max(0.0, peer.tokens_per_s / top))
    label = f"{peer.name}: {state}, {words.rate(peer.tokens_per_s)}"
    title = f"{label}. {peer.reason}" if peer.reason else label
    name = None if compact else tag("span", _SIGNS.get(state, ""), " ", peer.name, class_="cell-name")
    rate = None if compact else tag("small", words.rate(peer.tokens_per_s))
    return tag(
        "button",
        name,
        rate,
        type="button",
        class_=f"cell cell-{state}{' compact' if compact else ''}{' slow' if peer.findings else ''}",
        style=f"--share:{100 * share:.0f}%",  # a fill, not a size: only who moves shall move
        title=title,
        aria_label=label,
        data_do="peer",
        data_peer=peer.peer,
        data_key=peer.peer,
        data_flip=peer.peer,
    )
