"""One peer in full, at the side of the page: figures, what the run would be without it, what it did."""

from __future__ import annotations

from shoal.node.dashboard import words
from shoal.node.dashboard.markup import Markup, tag
from shoal.node.dashboard.panels.card import badge, button, empty, figure, figures
from shoal.node.dashboard.panels.events import event_list
from shoal.node.dashboard.panels.pipeline import peer_state
from shoal.node.dashboard.state import PageState, stage_word
from shoal.node.view.parts import Peer
from shoal.node.view.snapshot import Snapshot

_EVENTS = 20


def drawer(snapshot: Snapshot, state: PageState) -> Markup:
    """The open drawer, or nothing."""
    if not state.peer:
        return Markup()
    peer = next((peer for peer in snapshot.peers if peer.peer == state.peer), None)
    inside = (
        _inside(peer, snapshot, state) if peer else [tag("h2", "Gone"), empty("This peer has left the run.")]
    )
    close = tag("button", "×", type="button", class_="icon", data_do="close", aria_label="Close")
    return tag("dialog", close, *inside, class_="drawer", aria_label=f"Peer {peer.name if peer else ''}")


def _inside(peer: Peer, snapshot: Snapshot, state: PageState) -> list[Markup | None]:
    told = [event for event in snapshot.events if event.peer == peer.peer][-_EVENTS:]
    kind = peer_state(peer)
    return [
        tag("h2", peer.name),
        tag("p", tag("code", peer.peer), class_="note"),
        tag("p", badge(kind, f"cell-{kind}"), *(badge(role) for role in peer.roles), class_="badges"),
        tag("p", peer.reason, class_="note") if peer.liveness != "alive" else None,
        tag("p", peer.trouble, class_="trouble") if peer.trouble else None,
        tag("p", peer.if_leaves, class_="what-if") if peer.if_leaves else None,
        figures(
            figure(stage_word(peer.stages), "stage"),
            figure(words.rate(peer.tokens_per_s), "rate"),
            figure(words.duration(peer.service_s), "lane time of a micro-batch"),
            figure(words.duration(peer.backlog_s), "backlog"),
            figure(words.share(peer.busy_share), "lane busy"),
            figure(words.numbers(peer.heights), "round"),
            figure(words.number(peer.tokens), "tokens committed"),
            figure(words.loss(peer.loss), "loss"),
            figure(words.number(peer.micro_batches), "micro-batches accepted"),
            figure(words.number(peer.rejected), "rejected"),
            figure(words.number(peer.redone), "redone"),
            figure(words.milliseconds(peer.rtt_ms), "round trip"),
            figure(words.bits(peer.uplink_bytes_per_s), "uplink measured"),
            figure(words.size(peer.bytes_out), "sent"),
            figure(words.size(peer.bytes_in), "received"),
            figure(words.size(peer.memory_bytes), "memory"),
            figure(words.duration(peer.uptime_s), "uptime"),
            figure(stage_word(peer.guards), "guards stage"),
            figure(peer.version or words.NOTHING, "version"),
        ),
        tag("p", f"Reachable: {peer.reachable}", class_="note") if peer.reachable else None,
        tag("p", f"Device: {peer.device}", class_="note") if peer.device else None,
        tag("p", "Token ", tag("code", peer.token_id), class_="note") if peer.token_id else None,
        _orders(peer, snapshot, state),
        tag("h3", "Events"),
        event_list(told, snapshot) if told else empty("Nothing of late."),
    ]


def _orders(peer: Peer, snapshot: Snapshot, state: PageState) -> Markup | None:
    if peer.peer == snapshot.me.peer:
        return None
    shown = []
    for word, what, kind in (("Drain", "drain", ""), ("Kick", "kick", ""), ("Ban", "ban", "danger")):
        if state.can("order", what):
            shown.append(button(word, "ask", kind, what=what, peer=peer.peer))
    if state.can("token_revoke") and peer.token_id:
        shown.append(button("Revoke its token", "ask", "danger", what="token_revoke", token=peer.token_id))
    return tag("div", *shown, class_="buttons") if shown else None
