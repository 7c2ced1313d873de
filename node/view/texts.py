"""Texts that other peers wrote, made harmless before they are kept or shown: printable, one line, cut.

Escaping for HTML or a terminal's markup is the front end's; here only length and control characters go.
"""

from __future__ import annotations

from collections.abc import Mapping

from shoal.node.events import sentence
from shoal.node.view.messages import TelemetryEvent, TelemetryField

EVENT_TEXT_CHARACTERS = 240
Value = str | float


def printable(text: str, characters: int = EVENT_TEXT_CHARACTERS) -> str:
    """One line of printable characters, at most so many."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text[: 4 * characters])
    return text[:characters].strip()


def fields_of(event: TelemetryEvent) -> dict[str, Value]:
    """The event's values by name."""
    return {
        printable(field.name): field.number if field.numeric else printable(_first_line(field))
        for field in event.fields
    }


def _first_line(field: TelemetryField) -> str:
    """Of what was written for people the rest is detail; other values are short."""
    return field.text.lstrip().split("\n", 1)[0] if field.name == "text" else field.text


def told(kind: str, fields: dict[str, Value]) -> str:
    """The event in words; its kind where there are none or its fields are not what they should be."""
    try:
        if kind == "hedge":  # too frequent for whoever watches one peer's words go by
            return f"a second replica of stage {_whole(fields['stage'])} was asked: the first is slow"
        text = sentence(kind, {name: _whole(value) for name, value in fields.items()})
    except (KeyError, ValueError, TypeError, OverflowError):
        text = None
    return printable(text or str(fields.get("why") or fields.get("reason") or "") or kind)


def _whole(value: Value) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def number(fields: Mapping[str, Value], name: str) -> float | None:
    """A field, if it is a number."""
    value = fields.get(name)
    return value if isinstance(value, float) else None


def whole(fields: Mapping[str, Value], name: str, otherwise: int = 0) -> int:
    """A counter; `otherwise` where it is none."""
    value = fields.get(name)
    return int(value) if isinstance(value, float) and 0.0 <= value < 2**53 else otherwise
