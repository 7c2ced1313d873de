"""Frozen message types and their protobuf encoding: the border between the network and the program.

A message is a frozen dataclass marked `@wire_message`; its fields carry their bounds in their types:

    @wire_message
    @dataclass(frozen=True, slots=True)
    class Beat:
        height: Count
        head: Digest
        stages: Annotated[tuple[StageLoad, ...], Items(256)] = ()

`decode` refuses what the bounds do not admit with `MessageInvalid`, so code behind it never checks again;
`encode` applies the same bounds, so a bug of ours cannot leave this machine. The protobuf schema
is derived from the dataclass (field numbers follow the order of the fields: append, never reorder;
`tests/wire_schema.txt` freezes it), hence the two cannot drift apart. Fields may be int, float, bool,
str, bytes, another wire message, or a tuple of these. Floats must be finite. A message field `X | None`
is optional. Fields unknown to this version are ignored, those absent take protobuf's zero.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from shoal.protocol.errors import MessageInvalid, MessageTooLarge
from shoal.protocol.limits import HEADER_BYTES
from shoal.protocol.wire_code import Bounds as Bounds
from shoal.protocol.wire_code import FieldType, Fill, Read, copier, filler, reader
from shoal.protocol.wire_code import Items as Items
from shoal.protocol.wire_code import Length as Length
from shoal.protocol.wire_code import OneOf as OneOf

_Field = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "shoal.wire"
_SCALARS: dict[type, _Field.Type.ValueType] = {
    bool: _Field.TYPE_BOOL,
    int: _Field.TYPE_UINT64,
    float: _Field.TYPE_DOUBLE,
    str: _Field.TYPE_STRING,
    bytes: _Field.TYPE_BYTES,
}

COUNT_MOST = 2**53  # what JSON and floats carry exactly
Count = Annotated[int, Bounds(0, COUNT_MOST)]
Identifier = Annotated[int, Bounds(0, 2**64 - 1)]
Finite = Annotated[float, Bounds(-1e300, 1e300)]
Share = Annotated[float, Bounds(0.0, 1.0)]
Seconds = Annotated[float, Bounds(0.0, 1e9)]
Digest = Annotated[bytes, Length(32, 32)]
Text = Annotated[str, Length(0, 256)]

T = TypeVar("T")
_registry: dict[str, type] = {}


def wire_message(cls: type[T]) -> type[T]:
    """Register a frozen dataclass as a message; its class name is its name on the wire."""
    if _registry.setdefault(cls.__name__, cls) is not cls:
        raise TypeError(f"two wire messages are called {cls.__name__}")
    return cls


def encode(message: object, max_bytes: int = HEADER_BYTES) -> bytes:
    """Protobuf bytes of a wire message. Equal messages give equal bytes.

    Those that travel as payloads (entries of a log) name a `max_bytes` of their own.
    """
    data: bytes = _to_protobuf(message).SerializeToString(deterministic=True)
    if len(data) > max_bytes:
        raise MessageTooLarge(f"{type(message).__name__} takes {len(data)} of {max_bytes} bytes")
    return data


def decode(cls: type[T], data: bytes, max_bytes: int = HEADER_BYTES) -> T:
    """The message in `data`, every field within its bounds. Raises MessageInvalid or MessageTooLarge."""
    if len(data) > max_bytes:
        raise MessageTooLarge(f"{cls.__name__}: {len(data)} bytes, {max_bytes} allowed")
    parsed = _protobuf_class(cls)()
    try:
        parsed.ParseFromString(data)
    except DecodeError as error:
        raise MessageInvalid(f"{cls.__name__}: not protobuf ({len(data)} bytes)") from error
    message: T = _reader(cls)(parsed)
    return message


def changed(message: T, **values: object) -> T:
    """`dataclasses.replace` of a wire message, at a third of its cost; fields are not related to each other.

    Whatever is sent is checked by `encode`."""
    other: T = _copier(type(message))(message)
    for name, value in values.items():
        object.__setattr__(other, name, value)
    return other


def is_message(name: str) -> bool:
    """Whether an imported module has a wire message of that name."""
    return name in _registry


def decode_named(name: str, data: bytes) -> object:
    """The message of the type that the sender named. Raises MessageInvalid for unknown names."""
    cls = _registry.get(name)
    if cls is None:
        raise MessageInvalid(f"no message is called {name[:64]!r}; the peer may be a newer version")
    return decode(cls, data)


def schema() -> str:
    """All of Shoal's messages, one line a field: what `tests/wire_schema.txt` freezes."""
    lines = []
    for name, cls in sorted(_registry.items()):
        if not cls.__module__.startswith("shoal."):  # a test's own
            continue
        lines.append(name)
        lines += [f"  {i} {f.name}: {f.kind.__name__}{'*' if f.repeated else ''}"
                  for i, f in enumerate(_fields(cls), start=1)]  # fmt: skip
    return "\n".join(lines) + "\n"


def _cached(build: Callable[[type], T]) -> Callable[[type], T]:
    """functools.cache for functions of a class; that one's Hashable parameter does not admit `type`."""
    known: dict[type, T] = {}

    def lookup(cls: type) -> T:
        if cls not in known:
            known[cls] = build(cls)
        return known[cls]

    return lookup


@_cached
def _fields(cls: type) -> tuple[FieldType, ...]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return tuple(_field_type(f.name, hints[f.name]) for f in dataclasses.fields(cls))


def _field_type(name: str, hint: Any) -> FieldType:
    hint, outer = _split(hint)
    optional = False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (a for a in typing.get_args(hint) if a is not type(None))
        optional = True
    repeated = typing.get_origin(hint) is tuple
    checks = outer
    most = 0
    if repeated:
        (most,) = (check.high for check in outer if isinstance(check, Items))
        hint, checks = _split(typing.get_args(hint)[0])
    if hint not in _SCALARS and hint.__name__ not in _registry:
        raise TypeError(f"{name}: {hint!r} cannot cross the wire")
    return FieldType(name, hint, hint in _SCALARS, repeated, optional, checks, most)


def _split(hint: Any) -> tuple[Any, tuple[object, ...]]:
    """Annotated[X, a, b] -> (X, (a, b)), through nesting and NewTypes."""
    checks: tuple[object, ...] = ()
    while True:
        if typing.get_origin(hint) is Annotated:
            hint, *found = typing.get_args(hint)
            checks = (*found, *checks)
        elif isinstance(hint, typing.NewType):
            hint = hint.__supertype__
        else:
            return hint, checks


@_cached
def _copier(cls: type) -> Callable[[Any], Any]:
    return copier(cls)


@_cached
def _protobuf_class(cls: type) -> type[Message]:
    file = descriptor_pb2.FileDescriptorProto(
        name=f"shoal/{cls.__name__}.proto", package=_PACKAGE, syntax="proto3"
    )
    entry = file.message_type.add(name=cls.__name__)
    for number, field in enumerate(_fields(cls), start=1):
        label = _Field.LABEL_REPEATED if field.repeated else _Field.LABEL_OPTIONAL
        target = entry.field.add(name=field.name, number=number, label=label)
        if field.kind in _SCALARS:
            target.type = _SCALARS[field.kind]
        else:
            inner = _protobuf_class(field.kind).DESCRIPTOR
            target.type, target.type_name = _Field.TYPE_MESSAGE, f".{inner.full_name}"
            if inner.file.name not in file.dependency:
                file.dependency.append(inner.file.name)
    pool = descriptor_pool.Default()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{cls.__name__}"))


def _to_protobuf(message: object) -> Message:
    cls = type(message)
    target = _protobuf_class(cls)()
    _filler(cls)(target, message)
    return target


@_cached
def _filler(cls: type) -> Fill:
    return filler(cls, _fields(cls), lambda *found: _check(*found), _filler)


@_cached
def _reader(cls: type) -> Read:
    return reader(cls, _fields(cls), lambda *found: _check(*found), _reader)


def _check(cls: type, field: FieldType, value: object) -> None:
    for check in field.checks:
        match check:
            case Bounds(low, high):
                good = isinstance(value, int | float) and low <= value <= high
            case Length(low, high):
                good = isinstance(value, str | bytes) and low <= len(value) <= high
            case OneOf(allowed):
                good = value in allowed
            case _:
                continue
        if not good:
            raise MessageInvalid(f"{cls.__name__}.{field.name}: {_shown(value)}, allowed {check}")
    if isinstance(value, float) and not math.isfinite(value):
        raise MessageInvalid(f"{cls.__name__}.{field.name}: {value} is not a number to work with")


def _shown(value: object) -> str:
    if isinstance(value, bytes | str):
        return f"{type(value).__name__} of length {len(value)}"
    return repr(value)[:64]
