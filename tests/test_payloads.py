"""Payloads: what is pruned, and what stays to be found."""

from __future__ import annotations

from shoal.training.outer.payloads import Payloads
from shoal.training.outer.reduce import publish


def test_bytes_that_two_rounds_made_alike_are_found_until_the_later_one_is_pruned() -> None:
    """Weights that nobody moves give the same mean in every round."""
    payloads = Payloads(budget_bytes=100)
    for height in (1, 2):
        payloads.keep(height, {0: publish(b"\1", bytes(60)), 1: publish(b"\1", bytes([height] * 30))})
    same = publish(b"\1", bytes(60)).digest
    payloads.prune(2)
    assert not payloads.parts_at(1) and payloads.held_bytes == 90
    assert payloads.find(publish(b"\1", bytes([1] * 30)).digest) is None
    found = payloads.find(same)
    assert found is not None and found.digest == same
