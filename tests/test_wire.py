"""Messages at the border: what is in bounds survives the trip, nothing else gets in, the schema is frozen."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shoal.dht
import shoal.node
import shoal.protocol
import shoal.training
from shoal.protocol import wire
from shoal.protocol.errors import MessageInvalid, MessageTooLarge, ProtocolViolation
from shoal.protocol.limits import HEADER_BYTES
from shoal.protocol.wire import Bounds, Count, Digest, Finite, Items, Length, OneOf, wire_message

SCHEMA = Path(__file__).parent / "wire_schema.txt"


@wire_message
@dataclass(frozen=True, slots=True)
class ProbeInner:
    number: Count


@wire_message
@dataclass(frozen=True, slots=True)
class Probe:
    digest: Digest
    share: Annotated[float, Bounds(0, 1)]
    value: Finite
    word: Annotated[str, OneOf(frozenset({"yes", "no"}))]
    inner: ProbeInner
    maybe: ProbeInner | None
    many: Annotated[tuple[ProbeInner, ...], Items(3)]
    names: Annotated[tuple[Annotated[str, Length(1, 4)], ...], Items(2)]
    flag: bool = False


@wire_message
@dataclass(frozen=True, slots=True)
class ProbeOuter:
    inner: ProbeInner


@wire_message
@dataclass(frozen=True, slots=True)
class ProbeEmpty:
    pass


@wire_message
@dataclass(frozen=True, slots=True)
class ProbePair:
    low: Count
    high: Count

    def __post_init__(self) -> None:
        if self.high < self.low:
            raise ValueError("high is below low")


GOOD = Probe(bytes(32), 0.5, -1.0, "yes", ProbeInner(7), None, (ProbeInner(1),), ("ab",), True)


def test_a_message_survives_the_trip() -> None:
    assert wire.decode(Probe, wire.encode(GOOD)) == GOOD
    assert wire.decode_named("Probe", wire.encode(GOOD)) == GOOD


def test_a_changed_message_is_another_one() -> None:
    other = wire.changed(GOOD, share=0.25, names=("cd",))
    assert (other.share, other.names, other.inner) == (0.25, ("cd",), GOOD.inner)
    assert GOOD.share == 0.5
    with pytest.raises(AttributeError):
        wire.changed(GOOD, no_such_field=1)


def test_a_message_without_fields_survives_the_trip() -> None:
    assert wire.decode(ProbeEmpty, wire.encode(ProbeEmpty())) == ProbeEmpty()


def test_fields_that_do_not_fit_each_other_are_refused() -> None:
    data = bytearray(wire.encode(ProbePair(1, 2)))
    assert wire.decode(ProbePair, bytes(data)) == ProbePair(1, 2)
    data[-1] = 0
    with pytest.raises(MessageInvalid, match="high is below low"):
        wire.decode(ProbePair, bytes(data))


@pytest.mark.parametrize(
    "change",
    [
        {"digest": bytes(31)},
        {"share": 1.5},
        {"share": float("nan")},
        {"value": float("inf")},
        {"word": "perhaps"},
        {"many": (ProbeInner(1),) * 4},
        {"names": ("",)},
        {"names": ("abcde",)},
        {"inner": ProbeInner(2**53 + 1)},
    ],
)
def test_what_is_out_of_bounds_neither_leaves_nor_enters(
    change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {name: getattr(GOOD, name) for name in GOOD.__slots__}
    bad = Probe(**{**values, **change})
    with pytest.raises(MessageInvalid):
        wire.encode(bad)
    monkeypatch.setattr(wire, "_check", lambda *arguments: None)
    data = wire._to_protobuf(bad).SerializeToString() if len(bad.many) <= 3 else None
    monkeypatch.undo()
    if data is not None:
        with pytest.raises(MessageInvalid):
            wire.decode(Probe, data)


def test_a_missing_message_is_refused_and_an_unknown_name_too() -> None:
    with pytest.raises(MessageInvalid, match="missing"):
        wire.decode(ProbeOuter, b"")
    with pytest.raises(MessageInvalid, match="no message is called"):
        wire.decode_named("Nobody", b"")


def test_headers_are_capped() -> None:
    with pytest.raises(MessageTooLarge):
        wire.decode(Probe, bytes(HEADER_BYTES + 1))


@given(st.binary(max_size=512))
def test_any_bytes_give_a_message_or_a_typed_error(data: bytes) -> None:
    for name in wire._registry:
        with contextlib.suppress(ProtocolViolation):
            wire.decode_named(name, data)


@given(st.binary(min_size=0, max_size=64), st.integers(min_value=0))
def test_truncations_and_flips_of_a_good_message_never_escape(junk: bytes, at: int) -> None:
    data = wire.encode(GOOD)
    cut = at % len(data)
    for damaged in (data[:cut], data[:cut] + junk + data[cut:]):
        with contextlib.suppress(ProtocolViolation):
            wire.decode(Probe, damaged)


def test_the_schema_changes_only_on_purpose() -> None:
    """To accept a change, write the printed schema to tests/wire_schema.txt; append fields, never reorder."""
    for package in (shoal.protocol, shoal.dht, shoal.training, shoal.node):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)
    assert wire.schema() == SCHEMA.read_text(), f"schema now:\n{wire.schema()}"
