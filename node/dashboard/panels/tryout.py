"""The try-it box: a prompt for the live swarm, and what it writes."""

from __future__ import annotations

from html import escape

from shoal.node.dashboard import snippets
from shoal.node.dashboard.markup import Markup, tag
from shoal.node.dashboard.panels.card import button, card
from shoal.node.dashboard.state import PageState
from shoal.node.view.snapshot import Snapshot

PROMPT_CHARACTERS = 4000
MOST_TOKENS = 256
SHOWN_CHARACTERS = 8000


def tryout(snapshot: Snapshot, state: PageState) -> Markup:
    """The panel; nothing where the daemon cannot write."""
    if not state.can("generate_start"):
        return Markup()
    box = state.tryout
    form = tag(
        "form",
        tag(
            "label",
            "Prompt",
            tag(
                "textarea",
                name="prompt",
                rows=3,
                maxlength=PROMPT_CHARACTERS,
                placeholder="def ",
                spellcheck="false",
            ),
        ),
        tag("label", "Tokens", tag("input", name="tokens", type="number", min=1, max=MOST_TOKENS, value=48)),
        tag(
            "label",
            "Temperature",
            tag("input", name="temperature", type="number", min=0, max=2, step=0.1, value=0.7),
        ),
        tag("button", "Write", type="submit", class_="button go", disabled=box.running),
        button("Stop", "tryout-stop", "quiet") if box.running else None,
        data_do="tryout",
        class_="form tryout",
    )
    written = tag("b", Markup(_escaped(box.written)))
    shown = tag(
        "pre", Markup(_escaped(box.prompt)), written, class_="written", tabindex="0", aria_live="polite"
    )
    return card(
        "Try it",
        form,
        shown if box.prompt or box.written else None,
        tag("p", box.note, class_="note", role="status") if box.note else None,
        _from_programs(snapshot.run.name, box.prompt or "def "),
        note="What the run serves now, written by whoever holds its stages.",
    )


def _from_programs(model: str, prompt: str) -> Markup:
    """The same over OpenAI's HTTP API, to copy."""
    parts = (
        ("serve", "With a token that may ask the model, anywhere:", snippets.SERVE),
        ("curl", "Then, in a shell:", snippets.curl(model, prompt)),
        ("python", "or in Python:", snippets.python(model, prompt)),
    )
    return tag(
        "details",
        tag("summary", "From your programs (OpenAI's API)"),
        *(
            tag(
                "div",
                tag("span", title, class_="note"),
                tag("button", "Copy", type="button", class_="button small", data_copy=f"snippet-{name}"),
                tag("pre", Markup(_escaped(words)), id=f"snippet-{name}", class_="command", tabindex="0"),
                class_="snippet",
            )
            for name, title, words in parts
        ),
    )


def _escaped(words: str) -> str:
    kept = words[-SHOWN_CHARACTERS:]
    return escape("".join(mark for mark in kept if mark.isprintable() or mark in "\n\t"))
