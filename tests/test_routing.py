"""Routing: work goes where it is expected to finish first, in proportion to speed, and never all to one."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from shoal.training.pipeline.routing import (
    BUSY_SERVICES,
    HEDGE_GRACE_S,
    HEDGE_PRIOR,
    HEDGE_PRIOR_LEAST_S,
    HEDGE_SAMPLES,
    LANE_STALL_S,
    UNKNOWN_BUSY_S,
    UNKNOWN_STALL_S,
    Candidate,
    best,
    busy_for_s,
    choose,
    cost_s,
    expected_finish_s,
    hedge_after_s,
    stands_still,
)

BYTES = 1000


def replica(peer: str, **known: float) -> Candidate:
    values = {"rtt_s": 0.01, "seconds_per_byte": 0.0, "backlog_s": 0.0, "service_s": 0.1, **known}
    counts = {name: int(values.pop(name, 0)) for name in ("in_flight", "sent_since")}
    proven = bool(values.pop("proven", True))
    return Candidate(peer, proven=proven, **values, **counts)  # type: ignore[arg-type]


def test_nobody_to_ask_is_no_choice() -> None:
    assert choose([], BYTES, random.Random(1)) is None


def test_equal_views_and_draws_choose_alike_in_whatever_order_they_come() -> None:
    pool = [replica("a"), replica("b", backlog_s=0.2), replica("c", service_s=0.3), replica("d")]
    assert [choose(pool, BYTES, random.Random(n)) for n in range(50)] == [
        choose(pool[::-1], BYTES, random.Random(n)) for n in range(50)
    ]


def test_the_expected_finish_is_latency_and_bytes_and_backlog_and_work() -> None:
    one = replica("a", rtt_s=0.02, seconds_per_byte=1e-5, backlog_s=0.3, sent_since=2, service_s=0.1)
    assert expected_finish_s(one, BYTES) == pytest.approx(0.02 + 1000 * 1e-5 + 0.3 + 2 * 0.1 + 0.1)


@pytest.mark.parametrize(
    "worse",
    [{"rtt_s": 0.2}, {"seconds_per_byte": 1e-3}, {"backlog_s": 0.1}, {"sent_since": 1}, {"service_s": 0.2}],
)
def test_every_term_counts_in_the_comparison(worse: dict[str, float]) -> None:
    assert cost_s(replica("a", **worse), BYTES) > cost_s(replica("a"), BYTES)


def test_whose_speed_is_not_known_is_asked_first_whatever_it_claims() -> None:
    """CI, 2026-11-20: a joiner's first micro-batch took 0.44 s, the others' 0.08 s; nobody asked it again."""
    joiner, known = replica("a", service_s=0.44, proven=False), replica("b", service_s=0.08)
    assert cost_s(joiner, BYTES) < cost_s(known, BYTES)
    assert cost_s(replica("a", proven=False, backlog_s=0.2), BYTES) > cost_s(known, BYTES), (
        "unless it is full"
    )


def test_work_that_has_moved_on_still_counts_for_it_comes_back() -> None:
    """Three of ours were forwarded there; its queue is empty while the stages behind work."""
    assert cost_s(replica("a", in_flight=3), BYTES) > cost_s(replica("b", in_flight=1), BYTES)
    assert expected_finish_s(replica("a", in_flight=3), BYTES) == expected_finish_s(replica("b"), BYTES)


def test_who_would_answer_busy_is_not_asked_while_another_has_room() -> None:
    full = replica("a", service_s=0.1, backlog_s=0.5)
    slow = replica("b", service_s=0.9, backlog_s=0.3)
    assert cost_s(full, BYTES) < cost_s(slow, BYTES)
    assert best([full, slow], BYTES) == 1
    assert best([full], BYTES) == 0, "if nobody has, the best of them says for how long"


def test_few_are_compared_the_faster_more_often() -> None:
    """Otherwise all callers, who see the same numbers, would run to the one that was best a second ago."""
    pool = [replica(f"{n}", service_s=0.1 if n < 5 else 0.4, backlog_s=0.3) for n in range(10)]
    pool.append(replica("best", service_s=0.1))
    rng = random.Random(7)
    chosen = Counter(one.peer for _ in range(2000) if (one := choose(pool, BYTES, rng)))
    assert 0.2 < chosen["best"] / 2000 < 0.7
    fast, slow = (sum(chosen[f"{n}"] for n in some) for some in (range(5), range(5, 10)))
    assert fast > 3 * slow


def test_work_is_shared_by_speed() -> None:
    """Two replicas, one four times slower, each with its queue; as many arrive as both manage."""
    rng = random.Random(5)
    free_at = {"fast": 0.0, "slow": 0.0}
    service = {"fast": 0.1, "slow": 0.4}
    done: Counter[str] = Counter()
    now = 0.0
    for _ in range(4000):
        now += 0.08
        pool = [
            replica(peer, backlog_s=max(0.0, free_at[peer] - now), service_s=service[peer])
            for peer in free_at
        ]
        chosen = choose(pool, BYTES, rng)
        assert chosen is not None
        free_at[chosen.peer] = max(now, free_at[chosen.peer]) + service[chosen.peer]
        done[chosen.peer] += 1
    share = done["slow"] / done.total()
    assert abs(share - 0.2) <= 0.15 * 0.2, share


def test_a_full_replica_says_when_it_will_have_room() -> None:
    assert busy_for_s(9, BUSY_SERVICES * 0.1, 0.1) == 0.0
    assert busy_for_s(9, 1.0, 0.1) == pytest.approx(1.0 - BUSY_SERVICES * 0.1 + 0.05)


def test_a_lane_that_never_finished_anything_counts_its_queue() -> None:
    assert busy_for_s(int(BUSY_SERVICES) - 1, 0.0, 0.0) == 0.0
    assert busy_for_s(int(BUSY_SERVICES), 0.0, 0.0) == UNKNOWN_BUSY_S


def test_a_hedge_waits_for_the_95th_percentile_of_what_was_seen() -> None:
    ratios = [1.0] * 94 + [2.0] + [9.0] * 5
    assert hedge_after_s(0.5, ratios) == pytest.approx(0.5 * 2.0 + HEDGE_GRACE_S)
    assert hedge_after_s(0.5, [0.1] * 100) == pytest.approx(0.5 + HEDGE_GRACE_S), "never before it is due"


def test_before_there_are_answers_a_hedge_waits_for_a_multiple_of_what_is_expected() -> None:
    few = [1.0] * (HEDGE_SAMPLES - 1)
    assert hedge_after_s(3.0, few) == hedge_after_s(3.0, []) == HEDGE_PRIOR * 3.0
    assert hedge_after_s(0.01, few) == HEDGE_PRIOR_LEAST_S


def test_a_lane_stands_still_only_past_its_own_measure() -> None:
    assert not stands_still(LANE_STALL_S - 0.1, 0.1)
    assert stands_still(LANE_STALL_S, 0.1)
    assert not stands_still(30.0, 10.0), "ten seconds a micro-batch is slow, not still"
    assert stands_still(40.0, 10.0)
    assert not stands_still(UNKNOWN_STALL_S - 0.1, 0.1, known=False), "nobody knows yet how slow it is"
    assert stands_still(UNKNOWN_STALL_S, 0.1, known=False)
