"""The ledger: a micro-batch is applied once, whatever is asked how often."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.identity import PeerId
from shoal.training.pipeline.ledger import CHAINS_KEPT, Intervals, Ledger
from shoal.training.pipeline.messages import Link, MicroBatch

DRIVER, HOP = PeerId("d".ljust(52, "1")), PeerId("h".ljust(52, "1"))
CHAIN = (Link(0, DRIVER, 0), Link(1, HOP, 7))


def name(number: int, incarnation: int = 1) -> MicroBatch:
    return MicroBatch(DRIVER, incarnation, number)


@given(st.lists(st.integers(0, 60)))
def test_intervals_are_a_set(numbers: list[int]) -> None:
    spans = Intervals()
    for number in dict.fromkeys(numbers):
        assert number not in spans
        spans.add(number)
    assert [n for a, b in spans.spans for n in range(a, b)] == sorted(set(numbers))
    assert all(number in spans for number in numbers)
    assert len(spans) == len(set(numbers))
    assert all(b < c for (_, b), (c, _) in zip(spans.spans, spans.spans[1:], strict=False))


def test_a_second_application_is_refused_and_counted() -> None:
    ledger = Ledger()
    assert ledger.apply(name(4), CHAIN, 10)
    assert not ledger.apply(name(4), CHAIN, 10)
    assert (ledger.duplicates_refused, ledger.tokens, len(ledger)) == (1, 10, 1)
    assert ledger.apply(name(4, incarnation=2), CHAIN, 10)


def test_ids_are_kept_for_ever_and_chains_for_a_while() -> None:
    ledger = Ledger()
    for number in range(CHAINS_KEPT + 1):
        ledger.apply(name(number), CHAIN, 1)
    assert ledger.has(name(0))
    assert ledger.chain(name(0)) == ()
    assert ledger.chain(name(CHAINS_KEPT)) == CHAIN
    assert list(ledger.applied().values()) == [[(0, CHAINS_KEPT + 1)]]
