"""Verdicts on a peer's life, one row of a table per promise."""

from __future__ import annotations

import math

import pytest

from shoal.dht.liveness import Evidence, Liveness, Verdict, failed_call_hold_s, judge

ALIVE, SUSPECT, GONE = Liveness.ALIVE, Liveness.SUSPECT, Liveness.GONE


def linked(**changes: object) -> Evidence:
    """A neighbour with an open stream, heard at 100.0, whose record lapses at 130.0."""
    usual = {"record_until_s": 130.0, "watched_since_s": 50.0, "heard_s": 100.0, "stream_open": True}
    return Evidence(**(usual | changes))  # type: ignore[arg-type]


def distant(**changes: object) -> Evidence:
    """A peer of a large swarm that is no neighbour."""
    return Evidence(**({"record_until_s": 130.0} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("now", "seen", "liveness", "reason", "until_s"),
    [
        (100.0, linked(), ALIVE, "heard", 102.0),
        (101.9, linked(), ALIVE, "heard", 102.0),
        (102.0, linked(), SUSPECT, "silent for 2.0 s", 105.0),
        (105.0, linked(), GONE, "silent for 5.0 s", math.inf),
        (129.0, linked(heard_s=128.5, record_until_s=0.0), ALIVE, "heard", 130.5),  # streams outweigh records
        (51.0, linked(heard_s=None, stream_open=False), SUSPECT, "not heard yet", 55.0),
        (55.0, linked(heard_s=None, stream_open=False), GONE, "never answered for 5.0 s", math.inf),
        (100.1, linked(stream_open=False), SUSPECT, "its stream broke", 105.0),
        (100.1, linked(heard_s=49.0, watched_since_s=100.0), ALIVE, "heard", 102.0),  # watched again
        (100.1, linked(stream_open=False, refused=True), GONE, "refused", math.inf),
        (100.1, linked(refused=True), ALIVE, "heard", 102.0),  # the other side's stream came meanwhile
        (100.1, linked(said_goodbye=True), GONE, "goodbye", math.inf),
        (100.6, linked(failed_calls=1, failed_s=100.5, failed_reason="EOF"), SUSPECT, "failed: EOF", 105.0),
        (100.3, linked(failed_calls=1, failed_s=99.9), SUSPECT, "a call failed", 100.4),
        (100.6, linked(failed_calls=1, failed_s=99.5), ALIVE, "heard", 102.0),
        (103.0, linked(failed_calls=9, failed_s=97.0, heard_s=102.9), SUSPECT, "a call failed", 105.0),
        (100.0, linked(backlog_s=3.0, worked_s=91.0), ALIVE, "heard", 101.0),
        (101.0, linked(backlog_s=3.0, worked_s=91.0), SUSPECT, "no work for 10.0 s with 3.0 s queued", 102.0),
        (101.0, linked(backlog_s=3.0, worked_s=91.0, work_gap_s=4.0), ALIVE, "heard", 102.0),  # slow lane
        (101.0, linked(backlog_s=0.0, worked_s=1.0), ALIVE, "heard", 102.0),  # idle is not stalled
        (100.0, distant(), ALIVE, "record is fresh", 130.0),
        (130.0, distant(), GONE, "lapsed", math.inf),
        (100.2, distant(failed_calls=1, failed_s=100.0), SUSPECT, "a call failed", 100.5),
        (100.2, distant(refused=True), GONE, "refused", math.inf),
    ],
)
def test_verdict(now: float, seen: Evidence, liveness: Liveness, reason: str, until_s: float) -> None:
    verdict = judge(now, seen)
    assert verdict.liveness is liveness
    assert reason in verdict.reason
    assert verdict.until_s == pytest.approx(until_s)


def test_a_verdict_holds_until_the_time_it_names() -> None:
    for seen in (linked(), linked(backlog_s=1.0, worked_s=99.0), linked(stream_open=False), distant()):
        now, verdict = 100.0, judge(100.0, seen)
        while verdict.until_s < math.inf:
            assert verdict.until_s > now
            assert judge(math.nextafter(verdict.until_s, 0.0), seen).liveness is verdict.liveness
            now = verdict.until_s
            verdict = judge(now, seen)
        assert verdict == Verdict(GONE, verdict.reason)


def test_each_failed_call_counts_longer_but_never_for_ever() -> None:
    assert [failed_call_hold_s(n) for n in (0, 1, 2, 3)] == [0.0, 0.5, 1.0, 2.0]
    assert failed_call_hold_s(10_000) == 8.0
