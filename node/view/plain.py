"""Frozen dataclasses as plain values, and back from what JSON made of those."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_known: dict[Any, dict[str, Any]] = {}  # by class
_names: dict[Any, tuple[str, ...]] = {}
_SIMPLE = frozenset({str, int, float, bool, types.NoneType})


def read(cls: type[T], values: Mapping[str, object]) -> T:
    """The dataclass `cls`, parts of parts included. Unknown keys are ignored, absent ones take their default.

    Raises ValueError for a value of another type, or one that is absent without default.
    """
    hints = _hints(cls)
    try:
        return cls(**{name: _value(hint, values[name]) for name, hint in hints.items() if name in values})
    except TypeError as error:
        raise ValueError(f"not a {cls.__name__}: {error}") from error


def _hints(cls: Any) -> dict[str, Any]:
    if cls not in _known:
        hints = typing.get_type_hints(cls)
        _known[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return _known[cls]


def _value(hint: Any, value: Any) -> Any:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _one_of(inside, value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{value!r:.64} is no list")
        kinds = [inside[0]] * len(value) if inside[1:] == (...,) else list(inside)
        return tuple(_value(kind, element) for kind, element in zip(kinds, value, strict=True))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{value!r:.64} is no {getattr(hint, '__name__', hint)}")
        return read(typing.cast(type, hint), value)
    if origin is not None:  # Mapping
        if not isinstance(value, Mapping):
            raise ValueError(f"{value!r:.64} is no mapping")
        return {str(key): _value(inside[1], element) for key, element in value.items()}
    if hint is object:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{value!r:.64} is no {hint.__name__}")
    return value


def _one_of(kinds: tuple[Any, ...], value: Any) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        if kind is not types.NoneType:
            try:
                return _value(kind, value)
            except ValueError:
                continue
    raise ValueError(f"{value!r:.64} is none of {kinds}")


def plain(value: Any) -> Any:
    """Dicts, lists and plain values of a dataclass and all in it; `dataclasses.asdict` without its copies."""
    kind = type(value)
    if kind in _SIMPLE:
        return value
    names = _names.get(kind)
    if names is not None:
        return {name: plain(getattr(value, name)) for name in names}
    if kind is tuple or kind is list:
        return [plain(element) for element in value]
    if isinstance(value, Mapping):
        return {name: plain(element) for name, element in value.items()}
    if dataclasses.is_dataclass(kind):
        _names[kind] = tuple(field.name for field in dataclasses.fields(kind))
        return plain(value)
    return value
