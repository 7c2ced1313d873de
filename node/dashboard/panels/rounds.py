"""Rounds as a waterfall, and what they send."""

from __future__ import annotations

from shoal.node.dashboard import words
from shoal.node.dashboard.markup import Markup, join, tag
from shoal.node.dashboard.panels.card import card, empty, table
from shoal.node.dashboard.state import PageState
from shoal.node.view.parts import Phase, Round, RoundMember
from shoal.node.view.snapshot import Snapshot

PHASES = ("prepare", "wait", "send", "reduce", "collect", "decide", "apply")
_ROUNDS, _MEMBERS = 7, 12


def rounds(snapshot: Snapshot, state: PageState) -> Markup:
    """The newest rounds, one row for each member, phases one after the other."""
    shown = list(reversed(snapshot.rounds[-_ROUNDS:]))
    if not shown:
        steps = f"{snapshot.run.inner_steps} inner steps" if snapshot.run.inner_steps else "some inner steps"
        return card(
            "Rounds", empty(f"A stage's replicas agree in a round after {steps}; the first is to come.")
        )
    span_s = max(round_.seconds for round_ in shown) or 1.0
    keys = (tag("span", tag("i", class_=f"swatch phase-{name}"), name, class_="key") for name in PHASES)
    note = f"The widest takes {words.duration(span_s)}."
    return card(
        "Rounds",
        *(_round(r, span_s) for r in shown),
        note=note,
        aside=tag("span", *keys, class_="legend"),
    )


def _round(found: Round, span_s: float) -> Markup:
    rows = [
        tag(
            "div",
            tag("span", member.name, class_="who"),
            tag(
                "div",
                *(_phase(phase.name, phase.start_s, phase.seconds, span_s) for phase in _shown(member)),
                class_="lane",
            ),
            class_="member",
            data_key=member.peer,
        )
        for member in found.members[:_MEMBERS]
    ]
    told = [
        words.duration(found.seconds),
        words.count(found.contributors, "contributor"),
        words.size(found.bytes_out),
        " ".join(found.codecs),
        f"{found.skipped} skipped" if found.skipped else "",
    ]
    left_out = len(found.members) - len(rows)
    return tag(
        "div",
        tag("h3", f"Round {found.height}, stage {found.stage}", tag("small", " · ".join(filter(None, told)))),
        *rows,
        tag("p", f"and {left_out} more members", class_="note") if left_out > 0 else None,
        tag("p", longest, class_="note") if (longest := _longest(found)) else None,
        class_="round",
        data_key=f"{found.stage}/{found.height}",
    )


def _shown(member: RoundMember) -> list[Phase]:
    """The phases of the round itself: what a member told of its inner steps came before."""
    return [phase for phase in member.phases if phase.name in PHASES]


def _longest(found: Round) -> str:
    """Where a round of several members spent most, and at whom."""
    every = [(phase.seconds, phase.name, member.name) for member in found.members for phase in _shown(member)]
    if len(found.members) < 2 or not every:
        return ""
    seconds, phase, name = max(every)
    return f"Longest: {phase} at {name}, {words.duration(seconds)}"


def _phase(name: str, start_s: float, seconds: float, span_s: float) -> Markup:
    place = f"left:{start_s / span_s * 100:.2f}%;width:{max(0.4, seconds / span_s * 100):.2f}%"
    return tag("i", class_=f"phase-{name}", style=place, title=f"{name}: {words.duration(seconds)}")


def compression(snapshot: Snapshot, state: PageState) -> Markup:
    """What a value costs on the wire, and what rounding left for later."""
    rows = [
        tag(
            "tr",
            tag("th", str(row.stage), scope="row"),
            tag("td", join([row.contribution or "–", row.published or "–"], " → ")),
            tag("td", words.number(row.bits_per_value), class_="number"),
            tag("td", f"{row.ratio:.1f} ×" if row.ratio else "–", class_="number"),
            tag("td", words.size(row.round_bytes), class_="number"),
            tag("td", _residual(row.residual_norm, row.update_norm), class_="number"),
            data_key=str(row.stage),
        )
        for row in snapshot.compression
    ]
    if not rows:
        return card("Compression", empty("What a round costs on the wire, once there was one."))
    heads = ["Stage", "Codecs", *map(_number, ("Bits a value", "Against fp32", "A round", "Residual"))]
    note = "Residual: what rounding leaves for the next round, against the size of an update."
    return card("Compression", table([*heads], rows, "Compression by stage"), note=note)


def _residual(residual: float | None, update: float | None) -> str:
    return words.share(residual / update) if residual is not None and update else words.NOTHING


def _number(title: str) -> Markup:
    return tag("th", title, scope="col", class_="number")
