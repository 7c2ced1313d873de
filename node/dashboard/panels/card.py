"""The frame of a panel, and small things that several panels show."""

from __future__ import annotations

from shoal.node.dashboard.markup import Child, Markup, join, tag


def card(title: str, *content: Child, note: str = "", aside: Child = None) -> Markup:
    """The inside of a panel: its heading, something at the right of it, and the content."""
    words = tag("p", note, class_="note") if note else None
    return join([tag("header", tag("h2", title), aside, class_="card-head"), words, *content])


def figure(value: str, label: str) -> Markup:
    """A number with its name."""
    return tag("div", tag("dt", label), tag("dd", tag("b", value)), class_="figure")


def figures(*rows: Markup) -> Markup:
    return tag("dl", *rows, class_="figures")


def empty(words: str) -> Markup:
    return tag("p", words, class_="empty")


def badge(words: str, kind: str = "") -> Markup:
    return tag("span", words, class_=f"badge {kind}".strip())


def table(heads: list[Child], rows: list[Markup], caption: str) -> Markup:
    """A table that scrolls sideways by itself where the page is narrow."""
    head = tag(
        "thead", tag("tr", *(h if isinstance(h, Markup) else tag("th", h, scope="col") for h in heads))
    )
    inner = tag("table", tag("caption", caption, class_="unseen"), head, tag("tbody", *rows))
    return tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def button(words: str, do: str, kind: str = "", **data: object) -> Markup:
    """A button that tells the server `do` and its data."""
    fields = {f"data_{key}": value for key, value in data.items()}
    return tag("button", words, type="button", class_=f"button {kind}".strip(), data_do=do, **fields)
