"""Inviting people: make a token, copy what they paste, shut tokens out."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

import segno

from shoal.node.dashboard import words
from shoal.node.dashboard.markup import Markup, tag
from shoal.node.dashboard.panels.card import badge, button, card, empty, table
from shoal.node.dashboard.state import Invitation, PageState
from shoal.node.view.snapshot import Snapshot

_LIFETIMES = (("1 day", 86_400), ("7 days", 604_800), ("30 days", 2_592_000), ("1 hour", 3_600))
_ROLES = (("trainer", "train"), ("inference", "ask the model"), ("observer", "only look"))
_QR_BYTES = 2953  # the most that a QR code holds
NAME_CHARACTERS = 32


def invitations(snapshot: Snapshot, state: PageState) -> Markup:
    """The form, the token just made, and all tokens."""
    if not state.can("tokens"):
        return card("Invitations", empty("Make tokens on the owner's machine: shoal token create"))
    rows = [_row(token, state) for token in state.tokens]
    columns: list[object] = ["For", "Grants", "State", "Until", ""]
    heads = [
        tag("th", str(name) or Markup('<span class="unseen">Action</span>'), scope="col") for name in columns
    ]
    return card(
        "Invitations",
        _form() if state.can("token_create") else None,
        _made(state.invitation) if state.invitation else None,
        table([*heads], rows, "Tokens")
        if rows
        else empty("Nobody is invited yet: make a token above and send its command."),
        note="One volunteer, one token: then it can be shut out alone.",
    )


def _form() -> Markup:
    lifetimes = (
        tag("option", title, value=seconds, selected=seconds == 604_800) for title, seconds in _LIFETIMES
    )
    roles = (tag("option", title, value=role) for role, title in _ROLES)
    return tag(
        "form",
        tag(
            "label",
            "For whom",
            tag("input", name="name", maxlength=NAME_CHARACTERS, placeholder="a name", autocomplete="off"),
        ),
        tag("label", "May", tag("select", *roles, name="role")),
        tag("label", "Good for", tag("select", *lifetimes, name="ttl_s")),
        tag("button", "Create token", type="submit", class_="button go"),
        data_do="token_create",
        class_="form",
    )


def _made(made: Invitation) -> Markup:
    """The command with its token, which nothing shows again."""
    return tag(
        "div",
        tag(
            "p",
            tag("b", f"Token {made.token_id}"),
            f" for {made.name or 'somebody'}, until {words.day(made.until)}. "
            "Send them this line; it is a secret, and it is not shown again.",
        ),
        tag(
            "pre",
            tag("code", Markup(escape(made.command))),
            id="join-command",
            class_="command",
            tabindex="0",
        ),
        tag(
            "div",
            tag("button", "Copy", type="button", class_="button go", data_copy="join-command"),
            button("Done", "invitation-done", "quiet"),
            class_="buttons",
        ),
        _qr(made.command),
        class_="made",
        data_key=f"made {made.token_id}",
    )


def _qr(command: str) -> Markup | None:
    if len(command.encode()) > _QR_BYTES:
        return None
    source = segno.make(command, error="l", micro=False).svg_data_uri(scale=2, border=4, light="#fff")
    return tag(
        "details",
        tag("summary", "QR code"),
        tag("img", src=Markup(source.replace('"', "%22")), alt="The command as a QR code", class_="qr"),
    )


def _row(token: Mapping[str, object], state: PageState) -> Markup:
    kind, token_id = str(token.get("state", "")), str(token.get("id", ""))
    until, roles = token.get("not_after"), token.get("roles")
    shut = None
    own = isinstance(roles, list) and "owner" in roles  # without it the owner would shut itself out
    if kind == "good" and not own and state.can("token_revoke"):
        shut = button("Revoke", "ask", "danger small", what="token_revoke", token=token_id)
    return tag(
        "tr",
        tag("th", str(token.get("name") or "–"), tag("small", tag("code", token_id)), scope="row"),
        tag("td", ", ".join(map(str, roles)) if isinstance(roles, list) else ""),
        tag("td", badge(kind, "ok" if kind == "good" else "bad")),
        tag("td", words.day(float(until)) if isinstance(until, int | float) else "–"),
        tag("td", shut),
        data_key=token_id,
    )
