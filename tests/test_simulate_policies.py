"""The policy simulation: it conserves work, repeats itself, and tells good rules from bad ones."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.node.cli.app import main
from shoal.node.simulate import choice, policies
from shoal.node.simulate.choice import RANDOM, ROUTERS, SHOAL, SWARM
from shoal.node.simulate.compiled import PLAIN, Entrances
from shoal.node.simulate.directory import Shelves
from shoal.node.simulate.fleet import Node
from shoal.node.simulate.flow import Flow
from shoal.node.simulate.machines import Machine
from shoal.node.simulate.options import FULL_PROTOCOL_PEERS, Options, Recovery, Router
from shoal.node.simulate.outcome import Outcome
from shoal.node.simulate.places import Places
from shoal.node.simulate.run import simulate_run
from shoal.node.simulate.tables import BACKWARD, FORWARD, HELD, WAITING, Rules
from shoal.protocol.identity import PeerId
from shoal.training import spec_file
from shoal.training.spec import RunSpec
from shoal.training.templates import TEMPLATES

MEASURED = ("wall_s", "cpu_s", "virtual_s_per_cpu_s", "peak_rss_bytes")


def long_pipeline(stages: int = 6, rebalance_window_s: float = 15.0) -> RunSpec:
    """Hops of some hundred kilobytes; enough under way for queues."""
    values = TEMPLATES["small"].model_dump()
    values["stages"] |= {"count": stages, "rebalance_window_s": rebalance_window_s}
    values["inner"] |= {"in_flight": 24}
    values["limits"] |= {"undecided_micro_batches": 512}
    return RunSpec.model_validate(values)


@pytest.fixture(autouse=True)
def always_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all of these tests, which together are sooner done so."""
    monkeypatch.setattr(policies, "COMPILED_FROM", 0.0)


def options(**changes: object) -> Options:
    usual = Options(
        peers=60,
        duration_s=300.0,
        warmup_s=100.0,
        seed=2,
        session_s=600.0,
        micro_batch_s=2.0,
        policies_only=True,
    )
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


def simulated(**changes: object) -> Outcome:
    return simulate_run(long_pipeline(), options(**changes))


@pytest.mark.parametrize("recovery", ["redo", "adopt"])
@pytest.mark.parametrize("router", ["shoal", "swarm", "random"])
def test_equal_seeds_decide_alike(router: Router, recovery: Recovery) -> None:
    one, again, other = (
        simulated(router=router, recovery=recovery, seed=seed, duration_s=60.0) for seed in (2, 2, 3)
    )
    figures, repeated = (
        {key: value for key, value in outcome.to_json().items() if key not in MEASURED}
        for outcome in (one, again)
    )
    assert figures == repeated
    assert one.samples == again.samples
    assert one.trace != other.trace
    assert one.micro_batches > 0


def test_nothing_is_lost_where_nobody_goes() -> None:
    outcome = simulate_run(long_pipeline(rebalance_window_s=0.0), options(session_s=1e12))
    assert (outcome.lost, outcome.retries, outcome.joins) == (0, 0, 0)
    assert 0.5 < outcome.throughput_of_ideal <= 1.0
    assert outcome.throughput_of_placement <= 1.0 + 24 * 10 / outcome.micro_batches  # what was under way


def test_our_routing_makes_more_of_the_same_machines_than_chance() -> None:
    """Same machines, sessions and links; without churn, so that routing alone decides."""
    ours, chance = (simulated(router=router, session_s=1e12) for router in ("shoal", "random"))
    assert ours.micro_batches > 1.05 * chance.micro_batches


def test_work_behind_a_dead_hop_is_worth_keeping() -> None:
    kept, redone = (simulated(recovery=recovery, session_s=200.0) for recovery in ("adopt", "redo"))
    assert kept.kills == redone.kills
    assert kept.micro_batches > redone.micro_batches


def machine(number: int, speed: float = 1.0) -> Machine:
    return Machine(number, speed, 0.01, 1e7, 1e7, 1e9, killed=True)


class Chain:
    """So many replicas of each stage, one micro-batch under way, everything a second a piece."""

    def __init__(self, groups: list[int], recovery: Recovery = "redo", router: int = SHOAL) -> None:
        rules = Rules(
            last=len(groups) - 1,
            in_flight=1,
            held_most=64,
            weights_waiting=2,
            forward_bytes=0.0,
            backward_bytes=0.0,
            hop_bytes=0.0,
            adopts=recovery == "adopt",
            router=router,
        )
        self.flow = Flow(rules, np.random.default_rng(1))
        self.places = Places(self.flow, len(groups), random.Random(1))
        self.nodes: list[list[Node]] = []
        for stage, count in enumerate(groups):
            self.nodes.append([self.node(10 * stage + n, stage) for n in range(count)])
        self.flow.drive(self.nodes[0][0])

    def node(self, number: int, stage: int) -> Node:
        node = Node(number, PeerId(f"p{number:03d}"), machine(number), stage, service_s=3.0, state="online")
        self.places.arrive(node)
        self.places.serve(node)
        return node

    def kill(self, node: Node) -> None:
        node.state = "gone"
        self.places.leave(node)

    def holder(self, stage: int) -> Node:
        """Who has the micro-batch at a stage."""
        return next(node for node in self.nodes[stage] if self.flow.holds(node))

    def decided_at(self) -> float:
        while not self.flow.decided:
            self.flow.run(self.flow.now + 0.1)
        return self.flow.now


def test_a_micro_batch_takes_a_forward_and_a_backward_at_each_stage_and_the_way() -> None:
    assert Chain([1, 1, 1]).decided_at() == pytest.approx(6.0 + 4 * 0.02, abs=0.11)


@pytest.mark.parametrize("recovery", ["redo", "adopt"])
@pytest.mark.parametrize("after_s", [1.5, 2.5, 3.5, 4.5])
def test_whenever_a_hop_dies_another_one_takes_its_micro_batch(recovery: Recovery, after_s: float) -> None:
    chain = Chain([1, 2, 2], recovery)
    chain.flow.run(after_s)
    chain.kill(chain.holder(1))
    took_s = chain.decided_at()
    assert chain.flow.retries == 1 and len(chain.flow.reroutes) == 1
    assert chain.flow.lost == 0
    undisturbed_s = 6.1
    assert took_s <= after_s + undisturbed_s
    if recovery == "redo":  # adopted, a forward may be made up for while the stages behind compute
        assert took_s > undisturbed_s
    chain.flow.run(took_s + 0.5)
    assert sum(chain.flow.holds(node) for group in chain.nodes[1:] for node in group) <= 1  # of the next one


def test_queues_hold_together_where_many_are_turned_away_and_die() -> None:
    """Seed 2: a hop was asked for twice while it waited for room, and stood in the queue twice."""
    crowd = policies.Crowd(
        long_pipeline(), options(peers=40, session_s=100.0, micro_batch_s=8.0, duration_s=60.0)
    )
    looks = []

    def look() -> None:
        arrays = crowd.flow._tables
        looks.append(crowd.flow.now)
        for node, queue in itertools.product(range(crowd.flow._nodes), (FORWARD, BACKWARD, WAITING, HELD)):
            leg, last, length = arrays.queues[node, queue].tolist()
            seen: list[int] = []
            while len(seen) < length:
                seen.append(leg)
                leg = int(arrays.links[leg, max(queue - 1, 0)])
            assert len(set(seen)) == length and (not seen or seen[-1] == last), (node, queue, seen)

    for second in range(90, 120):
        crowd.flow.at(float(second), look)
    crowd.run(lambda done, whole: None)
    assert len(looks) == 30


def test_a_stage_without_anybody_waits_for_a_joiner() -> None:
    chain = Chain([1, 1, 1])
    chain.flow.run(1.5)
    chain.kill(chain.nodes[1][0])
    chain.flow.run(60.0)
    assert chain.flow.decided == 0
    chain.nodes[1].append(chain.node(99, 1))
    assert chain.decided_at() == pytest.approx(60.0 + 5.1, abs=0.2)


@pytest.mark.parametrize(("router", "expected"), [(SWARM, 3.0), (RANDOM, 1.0)])
def test_swarms_rule_learns_who_is_slow_and_chance_does_not(router: int, expected: float) -> None:
    chain = Chain([1, 2], router=router)
    (caller,), (fast, slow) = ([node.index for node in group] for group in chain.nodes)
    world, rng = chain.flow.world, np.random.default_rng(1)
    picked = {fast: 0, slow: 0}
    for _ in range(1000):
        node = int(world.known[world.nodes[caller].row, choice.pick(world, rng, caller, 0.0)])
        picked[node] += 1
        choice.answered(world, caller, node, 0.0, 0.0, 1.0 if node == fast else 3.0)
    assert picked[fast] / picked[slow] == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("router", ROUTERS)
def test_compiled_it_decides_the_same(router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place of work, each retry, each draw: the digest of both runs is one."""
    used: list[Entrances] = []

    def flow(rules: Rules, rng: np.random.Generator, entrances: Entrances) -> Flow:
        used.append(entrances)
        return Flow(rules, rng, entrances)

    monkeypatch.setattr(policies, "Flow", flow)
    found = []
    for least in (1e12, 0.0):
        monkeypatch.setattr(policies, "COMPILED_FROM", least)
        found.append(simulated(router=router, peers=30, session_s=150.0, duration_s=20.0, warmup_s=30.0))
    plain, compiled = found
    assert used[0] is PLAIN and used[1] is not PLAIN
    assert plain.retries > 0 and plain.trace == compiled.trace and plain.samples == compiled.samples
    assert plain.lanes() == compiled.lanes()


def test_the_account_of_the_lanes_adds_up() -> None:
    shares = simulated(session_s=200.0).lanes()
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.001)
    assert shares["useful"] > 0.3 and shares["thrown"] > 0.0
    assert shares["absent"] >= 0.0 and shares["uneven"] >= 0.0


def test_many_peers_are_simulated_by_their_policies_and_the_output_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.toml"
    spec_file.write(long_pipeline(), path)
    peers = str(FULL_PROTOCOL_PEERS + 1)
    command = [
        "shoal",
        "simulate",
        str(path),
        "--peers",
        peers,
        "--hours",
        "0.005",
        "--warmup",
        "20s",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    told = capsys.readouterr()
    assert "policies only" in told.err
    lines = told.out.splitlines()
    assert len(lines) == 1
    figures = json.loads(lines[0])
    assert figures["mode"] == "policies"
    assert {"throughput_of_ideal", "wall_s", "peak_rss_bytes", "directory_bytes_per_peer_s"} <= figures.keys()


def test_baselines_have_no_full_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.toml"
    spec_file.write(long_pipeline(), path)
    monkeypatch.setattr(sys, "argv", ["shoal", "simulate", str(path), "--full", "--routing", "swarm"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--policies-only" in capsys.readouterr().err


def test_what_the_directory_costs_a_peer_is_the_same_in_any_crowd() -> None:
    costs = []
    for peers in (100, 1000, 10_000):
        shelves = Shelves(24)
        for number in range(peers):
            node = Node(number, PeerId(f"peer {number}"), machine(number, 1.0), stage=number % 24)
            shelves.file(node, 1.0)
        rng = random.Random(peers)
        costs.append(statistics.fmean(shelves.bytes_per_s(rng) for _ in range(30)))
    assert max(costs) < 1.15 * min(costs), costs
