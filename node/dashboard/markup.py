"""HTML that cannot be broken out of: text is escaped and cut where it enters, only `Markup` passes as it is.

Everything the page shows is made with this, names and reasons that peers wrote among it.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

TEXT_CHARACTERS = 300  # of one text of somebody else's
_VOID = {"input", "br", "img", "line", "rect", "circle", "path", "polyline", "hr"}


class Markup(str):
    """HTML or SVG. A plain string is text, and is escaped when it becomes part of one."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]


def text(value: object, most: int = TEXT_CHARACTERS) -> Markup:
    """`value` as text: what does not print is dropped, what is longer is cut."""
    words = str(value)
    words = "".join(mark for mark in words[: most + 1] if mark.isprintable() or mark == "\n")
    return Markup(escape(words if len(words) <= most else words[: most - 1] + "…", quote=True))


def tag(name: str, /, *children: Child, **attributes: object) -> Markup:
    """An element. In attributes a last `_` is dropped, others become `-`; None and False leave one out."""
    shown = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{shown}/>" if not children else f"<{name}{shown}>{join(children)}</{name}>")
    return Markup(f"<{name}{shown}>{join(children)}</{name}>")


def join(children: Iterable[Child], between: str = "") -> Markup:
    """Children one after the other; None is nothing."""
    return Markup(between.join(_shown(child) for child in children if child is not None))


def _shown(child: Child) -> str:
    if isinstance(child, Markup):
        return child
    if child is None:
        return ""
    if isinstance(child, str | int | float):
        return text(child)
    return join(child)


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    shown = value if isinstance(value, Markup) else text(value, 4096)
    return f' {name}="{shown}"'
