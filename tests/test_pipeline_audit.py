"""The count over a pipeline's ledgers finds what P2 forbids, and excuses what somebody counted."""

from __future__ import annotations

from pipeline_audit import Account, audit

DRIVER = "driver/1"


def driver(*spans: tuple[int, int], lost: frozenset[int] = frozenset()) -> Account:
    return Account("w0/1", 0, {DRIVER: spans}, lost=lost, driver=DRIVER)


def hop(name: str, *spans: tuple[int, int], dropped: frozenset[tuple[str, int]] = frozenset()) -> Account:
    return Account(name, 1, {DRIVER: spans}, dropped=dropped)


def test_what_two_replicas_have_between_them_is_whole() -> None:
    found = audit([driver((0, 4)), hop("w2/1", (0, 1), (3, 4)), hop("w3/1", (1, 3))], 2)
    assert (found.decided, found.applied, found.broken) == (4, 4, [])


def test_a_micro_batch_at_two_lives_of_a_stage_is_found() -> None:
    found = audit([driver((0, 4)), hop("w2/1", (0, 3)), hop("w2/2", (2, 4))], 2)
    assert found.twice == ["driver/1:2 at 1"]
    assert found.broken


def test_what_is_missing_has_to_be_said_by_its_driver_or_a_hop_of_that_stage() -> None:
    lost = audit([driver((0, 2), lost=frozenset({1})), hop("w2/1", (0, 1))], 2)
    dropped = audit([driver((0, 2)), hop("w2/1", (0, 1), dropped=frozenset({("driver", 1)}))], 2)
    silent = audit([driver((0, 2)), hop("w2/1", (0, 1))], 2)
    assert (lost.excused, lost.broken) == (dropped.excused, dropped.broken) == (1, [])
    assert silent.unexplained == ["driver/1:1 at 1"]


def test_what_nobody_decided_must_not_be_applied() -> None:
    assert audit([driver((0, 1)), hop("w2/1", (0, 2))], 2).undecided == ["driver/1:1 at 1"]


def test_what_was_settled_before_is_not_counted_again() -> None:
    accounts = [driver((0, 3)), hop("w2/1", (1, 3))]
    found = audit(accounts, 2, before={(DRIVER, 0), (DRIVER, 1)})
    assert (found.decided, found.applied, found.broken) == (1, 1, [])
