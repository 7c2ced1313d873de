"""Whom a caller may ask: half-open breakers, slow start, claims that give way to own measurements, codecs."""

from __future__ import annotations

import random

import pytest

from shoal.protocol.identity import PeerId
from shoal.training.pipeline.link_codec import HYSTERESIS, LinkCodec, widest_in_time
from shoal.training.pipeline.replicas import Replica
from shoal.training.pipeline.standing import (
    BACKOFF_CAP_S,
    BACKOFF_S,
    NO_WINDOW,
    STALE_S,
    STALE_SERVICES,
    Report,
    Standing,
)

PEER = PeerId("p".ljust(52, "1"))


def answered(standing: Standing, times: int, now: float = 0.0, **report: float) -> Standing:
    values = {"service_s": 0.1, "backlog_s": 0.0, "seconds_per_byte": 0.0, **report}
    for _ in range(times):
        standing = standing.answered(now, Report(**values))
    return standing


def candidate_of(standing: Standing, sent_s: tuple[float, ...] = (), now: float = 10.0, **claim: float):  # type: ignore[no-untyped-def]
    return standing.candidate(Replica(PEER, 0.01, **claim), sent_s, now, 0.2)


# --- breaker


def test_a_breaker_opens_longer_after_each_failure_with_jitter_and_a_cap() -> None:
    for failures in range(12):
        waits = set()
        for seed in range(20):
            standing, rng = Standing(), random.Random(seed)
            for _ in range(failures + 1):
                standing = standing.failed(100.0, rng)
            waits.add(standing.closed_until_s - 100.0)
        expected_s = min(BACKOFF_CAP_S, BACKOFF_S * 2.0**failures)
        assert len(waits) == 20, "callers must not come back together"
        assert 0.5 * expected_s <= min(waits) <= max(waits) <= 1.5 * expected_s


def test_a_half_open_breaker_lets_one_probe_through_in_any_case() -> None:
    standing = answered(Standing(), 10).failed(0.0, random.Random(1))
    assert not standing.admits(0.1, 0, all_new=True)
    assert standing.admits(60.0, 0)
    assert not standing.admits(60.0, 1, all_new=True)
    closed = answered(standing, 1, now=60.0)
    assert closed.admits(60.0, 1)
    assert closed.failures == 0


def test_a_busy_replica_is_left_alone_for_its_time_and_not_held_guilty() -> None:
    standing = answered(Standing(), 9).busy(5.0, 2.0, 3, random.Random(1))
    assert not standing.admits(5.9, 0)
    assert standing.admits(8.1, 2)
    assert not standing.admits(8.1, 3, all_new=True), "as many as there were when it was full"
    assert answered(standing, 1).admits(8.1, 3), "and one more with each answer"
    assert standing.failures == 0


# --- slow start


def test_a_window_is_wider_for_what_another_replica_failed_with_where_one_is_known_to_work() -> None:
    known = answered(Standing(), 10).busy(0.0, 1.0, 3, random.Random(1))
    assert [known.admits(2.0, n, again=True) for n in (3, 4, 5)] == [True, True, False]
    assert not known.admits(2.0, 3)
    assert not known.admits(0.1, 0, again=True), "it has said for how long it is full"
    assert not Standing().admits(0.0, 1, again=True), "a newcomer is not flooded"
    assert not known.failed(2.0, random.Random(1)).admits(60.0, 1, again=True), "a probe goes alone"


def test_a_forward_passed_on_admits_one_more_long_before_the_answer() -> None:
    standing = Standing()
    assert not standing.admits(0.0, 1)
    standing = standing.passed(in_flight=1)
    assert standing.admits(0.0, 1)
    assert not standing.admits(0.0, 2), "one it works on, one that it has passed on"
    assert standing.passed(in_flight=1) == standing, "what is not used does not grow"


def test_a_new_replica_gets_one_then_twice_as_many_every_round_trip() -> None:
    standing, rounds = Standing(), []
    while standing.window < NO_WINDOW:
        under_way = standing.window
        assert standing.admits(0.0, under_way - 1)
        assert not standing.admits(0.0, under_way)
        rounds.append(under_way)
        standing = answered(standing, under_way)
    assert rounds == [1, 2, 4, 8, 16, 32]
    assert Standing().admits(0.0, 5, all_new=True), "where all are new, a slow start would spare nobody"


def test_who_returns_starts_slowly_again_and_is_measured_anew() -> None:
    known = answered(Standing(), 20)
    back = known.listed(False).listed(False).listed(True)
    assert (back.window, back.measured) == (1, 0)
    assert known.listed(True) == known


def test_a_replica_that_a_hedge_outran_gets_less() -> None:
    assert answered(Standing(), 9).outrun().window == 5
    assert Standing().outrun().window == 1


# --- rates and load


def test_claims_count_until_there_are_three_own_measurements() -> None:
    assert candidate_of(Standing()).service_s == 0.2, "nothing is known: what is typical of the stage"
    assert candidate_of(answered(Standing(), 2), service_s=0.5).service_s == 0.5
    assert candidate_of(answered(Standing(), 3), service_s=0.5).service_s == pytest.approx(0.1)


def test_the_newest_report_of_the_backlog_counts_less_the_time_since() -> None:
    standing = answered(Standing(), 3, now=9.0, backlog_s=4.0)
    assert candidate_of(standing).backlog_s == pytest.approx(3.0)
    assert candidate_of(standing, backlog_s=0.7, heard_s=9.5).backlog_s == pytest.approx(0.2)
    assert candidate_of(standing, backlog_s=0.7, heard_s=8.5).backlog_s == pytest.approx(3.0)


def test_what_was_sent_after_the_report_is_counted_apart() -> None:
    standing = answered(Standing(), 3, now=9.0)
    found = candidate_of(standing, (8.0, 9.5, 9.9))
    assert (found.in_flight, found.sent_since) == (3, 2)


def test_the_first_micro_batch_of_a_process_which_takes_longest_is_not_held_against_it() -> None:
    standing = answered(answered(Standing(), 1, service_s=0.44), 2, service_s=0.08)
    assert candidate_of(standing).service_s == pytest.approx(0.08)
    assert answered(standing, 1, service_s=0.18).service_s == pytest.approx(0.1), "from then on an average"


def test_who_was_not_asked_for_long_is_measured_anew() -> None:
    """A replica that was slow once is asked by nobody: what it does today is not known."""
    slow = answered(Standing(), 9, service_s=3.0)
    limit_s = STALE_SERVICES * 3.0
    assert slow.aged(limit_s) == slow
    anew = slow.aged(limit_s + 1.0)
    assert (anew.established, anew.window) == (False, 1)
    assert answered(anew, 3, service_s=0.1).service_s == pytest.approx(0.1)
    quick = answered(Standing(), 9)
    assert quick.aged(STALE_S) == quick
    assert not quick.aged(STALE_S + 1.0).established


# --- codecs by link


SIZES = {"float32": 400, "bfloat16": 200, "int8": 104}


@pytest.mark.parametrize(
    ("bytes_per_s", "codec"),
    [(1e9, "float32"), (501.0, "float32"), (499.0, "bfloat16"), (249.0, "int8"), (1.0, "int8")],
)
def test_a_link_gets_the_widest_codec_that_it_carries_while_the_device_computes(
    bytes_per_s: float, codec: str
) -> None:
    assert widest_in_time(SIZES, 1.0 / bytes_per_s, compute_s=1.0) == codec


def test_an_unmeasured_link_gets_the_widest() -> None:
    assert widest_in_time(SIZES, 0.0, compute_s=0.0) == "float32"


def test_a_codec_changes_only_when_ten_messages_in_a_row_want_another() -> None:
    link = LinkCodec("float32")
    for _ in range(HYSTERESIS - 1):
        link = link.wanting("int8")
    assert link.codec == "float32"
    assert link.wanting("float32").votes == 0
    assert link.wanting("int8") == LinkCodec("int8")
