"""The ledger: a micro-batch is applied once, whatever is asked how often."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shoal.training.pipeline.ledger as ledger_module
from shoal.protocol.identity import PeerId
from shoal.training.pipeline.ledger import CHAINS_KEPT, Intervals, Ledger
from shoal.training.pipeline.messages import Link, MicroBatch

DRIVER, HOP = PeerId("d".ljust(52, "1")), PeerId("h".ljust(52, "1"))
CHAIN = (Link(0, DRIVER, 0), Link(1, HOP, 7))


def name(number: int, incarnation: int = 1) -> MicroBatch:
    return MicroBatch(DRIVER, incarnation, number)


@given(st.lists(st.integers(0, 60)), st.integers(0, 61))
def test_intervals_are_a_set(numbers: list[int], floor: int) -> None:
    spans = Intervals()
    for number in dict.fromkeys(numbers):
        assert number not in spans
        spans.add(number)
    assert [n for a, b in spans.spans for n in range(a, b)] == sorted(set(numbers))
    assert all(number in spans for number in numbers)
    assert all(b < c for (_, b), (c, _) in zip(spans.spans, spans.spans[1:], strict=False))
    spans.raise_floor(floor)
    assert [n for a, b in spans.spans for n in range(a, b)] == sorted(n for n in set(numbers) if n >= floor)
    assert [n in spans for n in range(70)] == [n < floor or n in numbers for n in range(70)]


def test_a_second_application_is_refused_and_counted() -> None:
    ledger = Ledger()
    assert ledger.apply(name(4), CHAIN, 10)
    assert not ledger.apply(name(4), CHAIN, 10)
    assert (ledger.duplicates_refused, ledger.tokens, len(ledger)) == (1, 10, 1)
    assert ledger.apply(name(4, incarnation=2), CHAIN, 10)


def test_what_a_group_of_several_leaves_in_a_replicas_ledger_stops_growing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every other number goes to another replica, for as long as the run lasts."""
    monkeypatch.setattr(ledger_module, "APPLIED_KEPT", 100)
    ledger = Ledger()
    for number in range(0, 1000, 2):
        assert ledger.apply(name(number), CHAIN, 1)
    assert (len(ledger), ledger.tokens) == (500, 500)
    (spans,) = ledger.applied().values()
    assert spans == [(number, number + 1) for number in range(800, 1000, 2)]
    assert not ledger.apply(name(0), CHAIN, 1), "applied long ago"
    assert not ledger.apply(name(1), CHAIN, 1), "too old to know"
    assert ledger.apply(name(801), CHAIN, 1), "late, but not too late"
    for number in range(100):
        ledger.apply(name(number, incarnation=2), CHAIN, 1)
    assert len(ledger.applied()) == 1, "the process before has gone"


def test_ids_are_kept_for_ever_and_chains_for_a_while() -> None:
    ledger = Ledger()
    for number in range(CHAINS_KEPT + 1):
        ledger.apply(name(number), CHAIN, 1)
    assert ledger.has(name(0))
    assert ledger.chain(name(0)) == ()
    assert ledger.chain(name(CHAINS_KEPT)) == CHAIN
    assert list(ledger.applied().values()) == [[(0, CHAINS_KEPT + 1)]]
