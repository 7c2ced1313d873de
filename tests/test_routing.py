"""Routing: work goes where it is expected to finish first, in proportion to speed, and never all to one."""

from __future__ import annotations

import random
from collections import Counter

from shoal.training.pipeline.routing import Candidate, choose, expected_finish_s


def replica(peer: str, **known: float) -> Candidate:
    values = {"rtt_s": 0.01, "backlog_s": 0.0, "in_flight": 0, "service_s": 0.1, **known}
    return Candidate(
        peer, values["rtt_s"], values["backlog_s"], int(values["in_flight"]), values["service_s"]
    )


def test_nobody_to_ask_is_no_choice() -> None:
    assert choose([], random.Random(1)) is None


def test_equal_views_and_draws_choose_alike_in_whatever_order_they_come() -> None:
    pool = [replica("a"), replica("b", backlog_s=0.2), replica("c", service_s=0.3)]
    assert [choose(pool, random.Random(n)) for n in range(50)] == [
        choose(pool[::-1], random.Random(n)) for n in range(50)
    ]


def test_every_term_of_the_expected_finish_counts() -> None:
    base = expected_finish_s(replica("a"))
    for worse in ({"rtt_s": 0.2}, {"backlog_s": 0.1}, {"in_flight": 1}, {"service_s": 0.2}):
        assert expected_finish_s(replica("a", **worse)) > base


def test_work_is_shared_by_speed_when_what_is_in_flight_is_counted() -> None:
    """Two replicas, one four times slower: simulate the queue that `in_flight` stands for."""
    rng, seed = random.Random(5), 5
    print("seed", seed)
    free_at = {"fast": 0.0, "slow": 0.0}
    service = {"fast": 0.1, "slow": 0.4}
    done: Counter[str] = Counter()
    now = 0.0
    for _ in range(4000):
        now += 0.08  # the rate that both together manage
        pool = [
            replica(peer, backlog_s=max(0.0, free_at[peer] - now), service_s=service[peer])
            for peer in free_at
        ]
        chosen = choose(pool, rng)
        assert chosen is not None
        free_at[chosen.peer] = max(now, free_at[chosen.peer]) + service[chosen.peer]
        done[chosen.peer] += 1
    share = done["fast"] / done.total()
    assert abs(share - 0.8) <= 0.15 * 0.8, share


def test_an_unmeasured_newcomer_gets_some_work_but_not_all() -> None:
    rng = random.Random(6)
    done = Counter(
        chosen.peer
        for _ in range(1000)
        if (chosen := choose([replica("known", service_s=0.05), replica("new", service_s=0.0)], rng))
    )
    assert 100 < done["new"] < 900
