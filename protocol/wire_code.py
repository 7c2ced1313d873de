"""Straight-line Python for one wire message: what `wire` runs to fill and to read its protobuf form.

A loop over fields costs several times what it does to them, and heartbeats are many. So each message type
gets two functions of its own, written out field by field when it is first used, as `dataclasses` writes
`__init__`. Their text is made of a type's own field names and bounds, never of anything that came in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from google.protobuf.message import Message

from shoal.protocol.errors import MessageInvalid

Fill = Callable[[Message, Any], None]
Read = Callable[[Message], Any]
Check = Callable[[type, "FieldType", object], None]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Smallest and largest value of a number."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Length:
    """Fewest and most bytes (of bytes) or characters (of str)."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Items:
    """Most elements of a tuple."""

    high: int


@dataclass(frozen=True, slots=True)
class OneOf:
    """The closed set a str belongs to."""

    values: frozenset[str]


@dataclass(frozen=True, slots=True)
class FieldType:
    """One field of a wire message."""

    name: str
    kind: type  # a scalar type or a wire message class
    scalar: bool
    repeated: bool
    optional: bool
    checks: tuple[object, ...]  # of one value
    most: int  # elements, where repeated


def filler(cls: type, shape: Sequence[FieldType], check: Check, inner: Callable[[type], Fill]) -> Fill:
    """The function that puts a message into its protobuf form. `inner(kind)`: that of a message within."""
    lines, names = ["def made(target, message):", " pass"], _names(cls, shape, check)
    for at, field in enumerate(shape):
        name, good = field.name, partial(_good, field, at, names)
        lines.append(f" value = message.{name}")
        if not field.scalar:
            names[f"inner{at}"] = inner(field.kind)
        if field.repeated:
            lines.append(f" if len(value) > {field.most}: too_many(cls, field{at}, value)")
            lines.append(f" elements = target.{name}")
            lines.append(" for element in value:")
            if field.scalar:
                lines.append(f"  if not ({good('element')}): check(cls, field{at}, element)")
                lines.append("  elements.append(element)")
            else:
                lines.append(f"  inner{at}(elements.add(), element)")
        else:
            lines.append(" if value is not None:" if field.optional else " if True:")
            if field.scalar:
                unless_zero = "" if field.kind is float else "if value: "  # zeros are not sent, but for -0.0
                lines.append(f"  if {good('value')}:")
                lines.append(f"   {unless_zero}target.{name} = value")
                lines.append("  else:")
                lines.append(f"   check(cls, field{at}, value)")
                lines.append(f"   target.{name} = value")
            else:  # set, though all its fields may be zero
                lines.append(f"  part = target.{name}; part.SetInParent(); inner{at}(part, value)")
    fill: Fill = _made(lines, names)
    return fill


def reader(cls: type, shape: Sequence[FieldType], check: Check, inner: Callable[[type], Read]) -> Read:
    """The function that makes a message of its protobuf form, every field checked."""
    lines, names = ["def made(parsed):"], _names(cls, shape, check)
    for at, field in enumerate(shape):
        name, good = field.name, partial(_good, field, at, names)
        if not field.scalar:
            names[f"inner{at}"] = inner(field.kind)
        if field.repeated:
            lines.append(f" value{at} = parsed.{name}")
            lines.append(f" if len(value{at}) > {field.most}: too_many(cls, field{at}, value{at})")
            if field.scalar:
                lines.append(f" value{at} = tuple(value{at})")
                lines.append(f" for element in value{at}:")
                lines.append(f"  if not ({good('element')}): check(cls, field{at}, element)")
            else:
                lines.append(f" value{at} = tuple([inner{at}(element) for element in value{at}])")
        elif field.scalar:
            lines.append(f" value{at} = parsed.{name}")
            lines.append(f" if not ({good(f'value{at}')}): check(cls, field{at}, value{at})")
        else:
            absent = "None" if field.optional else f"missing(cls, field{at})"
            lines.append(f" value{at} = inner{at}(parsed.{name}) if parsed.HasField('{name}') else {absent}")
    lines.append(" message = new(cls)")  # not `cls(...)`: the __init__ of a frozen one takes twice as long
    for at, field in enumerate(shape):
        names[f"set{at}"] = getattr(cls, field.name).__set__
        lines.append(f" set{at}(message, value{at})")
    if hasattr(cls, "__post_init__"):  # relates fields to each other
        lines += [
            " try: message.__post_init__()",
            " except ValueError as error: raise unfit(cls, error) from error",
        ]
    lines.append(" return message")
    read: Read = _made(lines, names)
    return read


def copier(cls: type) -> Callable[[Any], Any]:
    """The function that makes another message of the same values: for `wire.changed`."""
    names: dict[str, Any] = {"cls": cls, "new": object.__new__}
    lines = ["def made(message):", " other = new(cls)"]
    for at, field in enumerate(fields(cls)):
        names[f"set{at}"] = getattr(cls, field.name).__set__
        lines.append(f" set{at}(other, message.{field.name})")
    copy: Callable[[Any], Any] = _made([*lines, " return other"], names)
    return copy


def _good(field: FieldType, at: int, names: dict[str, Any], value: str) -> str:
    """True only where `value` passes all checks: the usual ones, at less cost than `check`."""
    kind = f"type({value}) is {field.kind.__name__}"
    match field.kind.__name__, [c for c in field.checks if isinstance(c, Bounds | Length | OneOf)]:
        case (("int" | "float"), [Bounds(low, high)]) if math.isfinite(low) and math.isfinite(high):
            names[f"low{at}"], names[f"high{at}"] = low, high
            return f"{kind} and low{at} <= {value} <= high{at}"
        case (("str" | "bytes"), [Length(least, most)]):
            return f"{kind} and {least} <= len({value}) <= {most}"
        case "str", [OneOf(allowed)]:
            names[f"allowed{at}"] = allowed
            return f"{kind} and {value} in allowed{at}"
        case (("int" | "str" | "bytes" | "bool"), []):
            return kind
    return "False"


def _names(cls: type, shape: Sequence[FieldType], check: Check) -> dict[str, Any]:
    names = {"cls": cls, "check": check, "too_many": _too_many, "missing": _missing, "unfit": _unfit}
    return names | {"new": object.__new__} | {f"field{at}": field for at, field in enumerate(shape)}


def _made(lines: Sequence[str], names: dict[str, Any]) -> Any:
    exec("\n".join(lines), names)  # our own text, see the module
    return names["made"]


def _too_many(cls: type, field: FieldType, values: Sequence[object]) -> None:
    raise MessageInvalid(f"{cls.__name__}.{field.name}: {len(values)} elements, {field.most} allowed")


def _missing(cls: type, field: FieldType) -> None:
    raise MessageInvalid(f"{cls.__name__}.{field.name}: missing")


def _unfit(cls: type, error: ValueError) -> MessageInvalid:
    return MessageInvalid(f"{cls.__name__}: {error}")
