"""The simulator: repeatable, honest about what was lost, and its yardsticks right."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.node.cli.app import main
from shoal.node.simulate.account import overlap
from shoal.node.simulate.ideal import capacities, ideal_rate, ideal_work
from shoal.node.simulate.machines import Draws
from shoal.node.simulate.miniature import miniature
from shoal.node.simulate.options import Options
from shoal.node.simulate.outcome import Outcome
from shoal.node.simulate.run import simulate_run
from shoal.training import spec_file
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES

CHURN = Options(peers=6, duration_s=30.0, warmup_s=15.0, seed=3, session_s=60.0, micro_batch_s=0.8)


def pipeline_spec() -> RunSpec:
    """Two stages of a small model on bytes; enough micro-batches under way to fill them."""
    values = TEMPLATES["small"].model_dump()
    values["inner"] |= {"in_flight": 6, "optimizer": "sgd", "inner_tokens": 2048}
    values["outer"] |= {"inner_steps": 4}
    return RunSpec.model_validate(values)


@pytest.fixture(scope="module")
def churned() -> Outcome:
    return simulate_run(pipeline_spec(), CHURN)


def test_under_churn_the_swarm_trains_and_its_books_balance(churned: Outcome) -> None:
    assert churned.joins > 1 and churned.kills > 0 and churned.leaves > 0
    assert churned.micro_batches > 0
    assert churned.duplicated == 0
    assert churned.unexplained == 0
    assert all(height > 0 for height in churned.rounds)
    assert 0.3 < churned.throughput_of_ideal <= 1.0
    assert churned.bytes_by_use["pipeline"] > 0 and churned.bytes_by_use["rounds"] > 0


def test_the_policy_simulation_counts_the_directory_as_the_full_one_does() -> None:
    calm = dataclasses.replace(CHURN, session_s=1e9, duration_s=60.0, micro_batch_s=8.0)
    found = [
        float(str(simulate_run(pipeline_spec(), options).to_json()["directory_bytes_per_peer_s"]))
        for options in (calm, dataclasses.replace(calm, policies_only=True))
    ]
    assert found[0] == pytest.approx(
        found[1], rel=0.6
    )  # in so short a time the first, quick looks weigh much


@pytest.mark.parametrize(("seed", "peers", "stages_most"), [(11, 8, 1), (12, 8, 1), (13, 3, 2)])
def test_no_promise_is_broken_under_churn(seed: int, peers: int, stages_most: int) -> None:
    """A share of what tests/soak/swarm.py does with 50 peers, and with few that hold several stages."""
    options = dataclasses.replace(
        CHURN, peers=peers, duration_s=200.0 / peers, seed=seed, session_s=40.0, stages_most=stages_most
    )
    outcome = simulate_run(pipeline_spec(), options)
    print("seed", seed, outcome.to_json())
    assert outcome.joins > 2 and outcome.micro_batches > 0
    assert outcome.broken == []


@pytest.mark.parametrize("stages_most", [1, 2])
def test_two_peers_fill_three_stages_if_one_may_hold_two(stages_most: int) -> None:
    values = pipeline_spec().model_dump()
    values["stages"] |= {"count": 3, "rebalance_window_s": 5.0}
    calm = dataclasses.replace(CHURN, peers=2, warmup_s=30.0, session_s=1e9, stages_most=stages_most)
    outcome = simulate_run(RunSpec.model_validate(values), calm)
    assert outcome.broken == [] and outcome.unexplained == 0
    if stages_most == 1:
        assert outcome.micro_batches == 0 and not all(outcome.rounds)
    else:
        assert outcome.micro_batches > 0 and all(outcome.rounds)
        assert all(all(sample.capacity) for sample in outcome.measured)


def test_the_same_seed_gives_the_same_trace_and_another_one_another(churned: Outcome) -> None:
    """P9, message by message, with all figures."""
    again = simulate_run(pipeline_spec(), CHURN)
    other = simulate_run(pipeline_spec(), dataclasses.replace(CHURN, seed=4))
    measured = ("wall_s", "cpu_s", "virtual_s_per_cpu_s", "peak_rss_bytes")
    figures, repeated = (
        {key: value for key, value in outcome.to_json().items() if key not in measured}
        for outcome in (churned, again)
    )
    assert figures == repeated
    assert churned.samples == again.samples
    assert other.trace != churned.trace


def test_the_trace_does_not_depend_on_the_process(tmp_path: Path) -> None:
    """Hashes of strings differ from process to process; nothing may hang on the order of a set of them."""
    path = tmp_path / "run.toml"
    spec_file.write(pipeline_spec(), path)
    traces = set()
    for hash_seed in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-m", "shoal.node.cli", "simulate", path, "--peers", "4", "--hours", "0.003",
             "--session", "12s", "--micro-batch", "1s", "--warmup", "6s", "--seed", "5", "--json"],
            env={"PYTHONHASHSEED": hash_seed, **_environment()},
            capture_output=True,
            text=True,
            check=True,
        )  # fmt: skip
        assert len(ran.stdout.splitlines()) == 1
        traces.add(json.loads(ran.stdout)["trace"])
    assert len(traces) == 1


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONHASHSEED"}


def test_the_command_tells_people_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.toml"
    spec_file.write(pipeline_spec(), path)
    monkeypatch.setattr(
        sys, "argv", ["shoal", "simulate", str(path), "--peers", "2", "--hours", "0.002", "--warmup", "8s"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "of the ideal assignment" in told
    assert "0 counted twice" in told


def test_the_ideal_is_the_optimum_of_the_linear_programme() -> None:
    """Primal and dual solutions of the same value: no assignment is better."""
    speeds, costs = [0.5, 1.0, 4.0], [2.0, 1.0, 3.0]
    rate = ideal_rate(speeds, costs)
    shares = [cost / sum(costs) for cost in costs]  # everybody's, primal
    for share, cost in zip(shares, costs, strict=True):
        assert sum(speed * share / cost for speed in speeds) == pytest.approx(rate)
    stage_prices = [cost / sum(costs) for cost in costs]  # dual: they add up to 1
    peer_prices = [
        max(price * speed / cost for price, cost in zip(stage_prices, costs, strict=True)) for speed in speeds
    ]
    assert sum(stage_prices) == pytest.approx(1.0)
    assert sum(peer_prices) == pytest.approx(rate)
    whole = capacities([(0, 4.0), (1, 0.5), (2, 1.0)], costs)  # whole peers at stages do no better
    assert min(whole) <= rate


def test_work_counts_while_a_peer_is_ready_and_there() -> None:
    lives = [(2.0, 0.0, math.inf), (1.0, 12.0, 14.0), (5.0, 0.0, 9.0), (1.0, 30.0, math.inf)]
    assert ideal_work(lives, 10.0, 20.0) == pytest.approx(2.0 * 10 + 1.0 * 2)


def test_machines_are_drawn_by_number_and_have_the_promised_means() -> None:
    draws = Draws(seed=7, speed_spread=8.0, session_s=600.0, kill_share=0.25)
    machines = [draws.machine(number) for number in range(4000)]
    assert machines[123] == draws.machine(123)
    assert statistics.fmean(1 / machine.speed for machine in machines) == pytest.approx(1.0, rel=0.05)
    assert statistics.fmean(machine.session_s for machine in machines) == pytest.approx(600.0, rel=0.06)
    assert statistics.fmean(machine.killed for machine in machines) == pytest.approx(0.25, abs=0.03)
    speeds = sorted(machine.speed for machine in machines)
    assert speeds[-1] / speeds[0] == pytest.approx(8.0, rel=0.02)


@pytest.mark.parametrize("template", ["tiny", "small", "125m", "1b"])
def test_a_miniature_keeps_what_decides_a_swarm(template: str) -> None:
    spec = TEMPLATES[template]
    small = miniature(spec)
    assert small.spec.stages.count == spec.stages.count
    assert small.spec.outer.inner_steps == spec.outer.inner_steps
    assert small.spec.limits == spec.limits
    steps = -(-spec.inner.inner_tokens // spec.micro_batch_tokens)
    assert small.spec.inner.inner_tokens == steps * small.spec.micro_batch_tokens
    assert statistics.fmean(small.costs) == pytest.approx(1.0)
    assert small.factor("stage.1.propagate") > 100
    assert small.factor("outer.0.contribute") > 1
    assert small.factor("beat") == small.factor("outer.0.round") == 1.0


def test_what_two_replicas_applied_counts_once_for_each_time_too_many() -> None:
    assert overlap([{"a/1": [(0, 5)]}, {"a/1": [(5, 9)], "b/1": [(0, 3)]}]) == 0
    assert overlap([{"a/1": [(0, 5)]}, {"a/1": [(3, 9)]}, {"a/1": [(4, 5)]}]) == 3
