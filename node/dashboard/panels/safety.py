"""What would survive, who was refused, and how this coordinator itself fares."""

from __future__ import annotations

from shoal.node.dashboard import words
from shoal.node.dashboard.markup import Markup, tag
from shoal.node.dashboard.panels.card import card, figure, figures, table
from shoal.node.dashboard.state import PageState
from shoal.node.view.snapshot import Snapshot


def checkpoints(snapshot: Snapshot, state: PageState) -> Markup:
    """The last whole checkpoint, and what each stage has on disk."""
    found = snapshot.checkpoints
    rows = [
        tag("tr", tag("th", f"Stage {stage}", scope="row"), tag("td", words.number(height), class_="number"))
        for stage, height in sorted(found.stages.items())
    ]
    return card(
        "Checkpoints",
        figures(
            figure(
                f"{words.duration(found.age_s)} ago" if found.age_s is not None else "none yet",
                "last whole one",
            ),
            figure(words.size(found.bytes), "size"),
            figure(", ".join(map(str, found.heights)) or words.NOTHING, "at rounds"),
        ),
        tag("p", found.refused, class_="trouble") if found.refused else None,
        tag("p", tag("code", found.path), class_="note") if found.path else None,
        _exported(state),
        table(["On disk", tag("th", "Round", scope="col", class_="number")], rows, "Newest round on disk")
        if rows
        else None,
    )


def _exported(state: PageState) -> Markup | None:
    """The button, and what became of it."""
    if not state.can("checkpoint_export"):
        return None
    made = state.exported
    running, path, why_not = bool(made.get("running")), made.get("path"), made.get("why_not")
    return tag(
        "div",
        tag("button", "Export", type="button", class_="button small", data_do="export", disabled=running),
        tag("span", "Writing a folder for transformers…", class_="note") if running else None,
        tag("p", "For AutoModelForCausalLM: ", tag("code", str(path)), class_="note") if path else None,
        tag("p", str(why_not), class_="trouble") if why_not else None,
        class_="tools",
    )


def trust(snapshot: Snapshot, state: PageState) -> Markup:
    """Refusals by kind, and by whose data."""
    found = snapshot.trust
    names = {peer.peer: peer.name for peer in snapshot.peers}
    by_kind = [
        tag("tr", tag("th", kind, scope="row"), tag("td", words.number(number), class_="number"))
        for kind, number in sorted(found.refusals.items(), key=lambda item: -item[1])
    ]
    by_peer = [
        tag(
            "tr",
            tag("th", names.get(peer, peer[-6:]), scope="row"),
            tag("td", words.number(n), class_="number"),
        )
        for peer, n in sorted(found.refused.items(), key=lambda item: -item[1])
    ]
    times = tag("th", "Times", scope="col", class_="number")
    return card(
        "Trust",
        figures(
            figure(words.number(found.revocation_version), "revocation list"),
            figure(words.number(found.repaired_parts), "parts repaired"),
            figure(words.number(found.audits.get("agreed", 0)), "answers recomputed"),
            figure(words.number(found.audits.get("disagreed", 0)), "that disagreed"),
        ),
        table(["Streams refused here", times], by_kind, "Streams refused here") if by_kind else None,
        table(["Data refused from", times], by_peer, "Data refused, by peer") if by_peer else None,
    )


def coordinator(snapshot: Snapshot, state: PageState) -> Markup:
    """This daemon."""
    found, me = snapshot.coordinator, snapshot.me
    return card(
        "Coordinator",
        figures(
            figure(words.share(found.cpu_share), "of a core"),
            figure(words.size(found.memory_bytes), "memory"),
            figure(words.duration(me.uptime_s), "uptime"),
            figure(words.number(found.pushing), "peers tell it"),
            figure(words.number(found.events_taken), "events taken"),
            figure(words.number(found.events_dropped + found.events_refused), "events lost"),
            figure(words.size(found.history_bytes), "history"),
            figure(words.milliseconds(me.loop.lag_p99_ms), "loop lag, p99"),
        ),
        tag("p", f"History: {found.history}", class_="note"),
        tag("p", me.reachable, class_="note") if me.reachable else None,
    )
