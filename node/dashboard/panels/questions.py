"""What has to be answered before anything is done: confirmations, and the form of rates; as dialogs."""

from __future__ import annotations

from collections.abc import Mapping

from shoal.node.dashboard.markup import Markup, tag
from shoal.node.dashboard.panels.card import button
from shoal.node.dashboard.state import PageState, Question
from shoal.node.view.snapshot import Snapshot

REASON_CHARACTERS = 200
_ORDERS = {
    "pause": (
        "Pause training?",
        "Every peer finishes its round, keeps its place and waits. Nothing is lost.",
        "Pause",
    ),
    "resume": ("Resume training?", "Every peer goes on where it stopped.", "Resume"),
    "stop": ("Stop the run?", "Every peer finishes what it holds and leaves. Checkpoints stay.", "Stop"),
    "checkpoint": (
        "Write a checkpoint now?",
        "One replica of every stage writes at once, beside its training.",
        "Write it",
    ),
    "drain": (
        "Let {name} finish and go?",
        "It ends what it holds and leaves its stage. It may come back.",
        "Drain",
    ),
    "kick": ("Kick {name}?", "It is sent away at once. It may come back.", "Kick"),
    "ban": ("Ban {name}?", "It is sent away and not let in again, until it is unbanned.", "Ban"),
    "unban": ("Let {name} in again?", "It may join with its token, if that is still good.", "Unban"),
}
RATES = (
    ("inner.learning_rate", "Learning rate"),
    ("outer.inner_steps", "H, inner steps of a round"),
)


def question_of(values: Mapping[str, object], snapshot: Snapshot | None) -> Question | None:
    """The confirmation for a button that was pressed; None for one that the page does not have."""
    what, peer = str(values.get("what", "")), str(values.get("peer", ""))
    if what == "token_revoke":
        token = str(values.get("token", ""))
        return Question(
            "Revoke this token?",
            f"Whoever joined with {token} is sent away, for good.",
            "Revoke",
            "token_revoke",
            {"id": token},
            danger=True,
        )
    if what not in _ORDERS:
        return None
    title, sentence, press = _ORDERS[what]
    arguments: dict[str, object] = {"what": what}
    if what == "unban":
        arguments["peer"] = peer
        return Question(title.format(name=peer[-6:]), sentence, press, "order", arguments)
    if what in ("drain", "kick", "ban"):
        known = {row.peer: row for row in snapshot.peers} if snapshot else {}
        if peer not in known:
            return None
        arguments["peer"] = peer
        return Question(
            title.format(name=known[peer].name),
            f"{sentence} {known[peer].if_leaves}",
            press,
            "order",
            arguments,
            danger=what != "drain",
            asks_reason=True,
        )
    return Question(title, sentence, press, "order", arguments, danger=what == "stop")


def dialogs(snapshot: Snapshot, state: PageState) -> Markup:
    """The open one, or nothing."""
    if state.question is not None:
        return _question(state.question, state.refusal)
    return _rates(snapshot, state) if state.rates_open else Markup()


def _question(asked: Question, refusal: str) -> Markup:
    reason = tag(
        "label", "Reason", tag("input", name="reason", maxlength=REASON_CHARACTERS, autocomplete="off")
    )
    return tag(
        "dialog",
        tag("h2", asked.title, id="question"),
        tag("p", asked.words),
        tag(
            "form",
            reason if asked.asks_reason else None,
            tag("p", refusal, class_="trouble", role="alert") if refusal else None,
            tag(
                "div",
                tag(
                    "button",
                    asked.button,
                    type="submit",
                    class_=f"button {'danger' if asked.danger else 'go'}",
                ),
                button("Cancel", "close", "quiet"),
                class_="buttons",
            ),
            data_do="confirm",
        ),
        class_="question",
        aria_labelledby="question",
    )


def _rates(snapshot: Snapshot, state: PageState) -> Markup:
    now = state.orders.get("values")
    values = now if isinstance(now, Mapping) else {}
    shown = {
        "inner.learning_rate": values.get("inner.learning_rate", snapshot.run.learning_rate),
        "outer.inner_steps": values.get("outer.inner_steps", snapshot.run.inner_steps),
    }
    fields = (
        tag("label", title, tag("input", name=key, value=shown[key], inputmode="decimal", autocomplete="off"))
        for key, title in RATES
    )
    return tag(
        "dialog",
        tag("h2", "Learning rate and H", id="question"),
        tag("p", "In force from the next round on, the same for every member of a stage."),
        tag(
            "form",
            *fields,
            tag("p", state.refusal, class_="trouble", role="alert") if state.refusal else None,
            tag(
                "div",
                tag("button", "Change", type="submit", class_="button go"),
                button("Cancel", "close", "quiet"),
                class_="buttons",
            ),
            data_do="set-rates",
        ),
        class_="question",
        aria_labelledby="question",
    )


def toast(snapshot: Snapshot | None, state: PageState) -> Markup:
    """What the last action did."""
    return tag("p", state.told, class_="toast") if state.told else Markup()
