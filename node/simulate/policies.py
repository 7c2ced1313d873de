"""The policy simulation: ten thousand peers, of whom only the decisions are simulated.

Peers come and go like in the full one (`swarm`), micro-batches follow `flow`. Routing, admission, placement
and rebalancing are the functions that real peers call, on what a real peer would see: a few replicas of the
next stage, as many as `dht.neighbours` gives it, and, when it joins, what its looks into the directory show.
"""

from __future__ import annotations

import itertools
import random
import statistics

import numpy as np
from blake3 import blake3

from shoal.node.simulate.choice import ROUTERS
from shoal.node.simulate.compiled import PLAIN, compiled
from shoal.node.simulate.directory import RECORD_BYTES, Shelves
from shoal.node.simulate.fleet import Node
from shoal.node.simulate.flow import Flow
from shoal.node.simulate.ideal import capacities, ideal_rate
from shoal.node.simulate.machines import Machine
from shoal.node.simulate.miniature import miniature
from shoal.node.simulate.options import Options
from shoal.node.simulate.outcome import SAMPLES, Life, Outcome, Progress, Sample, Stopwatch
from shoal.node.simulate.passage import PIECES
from shoal.node.simulate.placers import Placer, ShoalPlacer, SwarmPlacer
from shoal.node.simulate.places import Places
from shoal.node.simulate.tables import Rules
from shoal.protocol.identity import PeerId
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.spec import RunSpec
from shoal.training.work import weights_in_stock

_LOOK_S = 1.6  # a joiner looks around, and once more: `placing`
COMPILED_FROM = 15_000.0  # peers times virtual seconds: below, it is sooner done as it stands
_DRAIN_S = 20.0  # as the daemon's
_UNLIMITED = 1 << 40  # others' rules turn nobody away: what a hop holds for them takes no memory here
_ASKED = 4  # peers, at each sample, what the directory costs them


def simulate_policies(
    spec: RunSpec, options: Options, progress: Progress = lambda done_s, all_s: None
) -> Outcome:
    """Run it. The same spec and options give the same outcome."""
    crowd = Crowd(spec, options)
    with Stopwatch(crowd.outcome):
        crowd.run(progress)
    return crowd.outcome


class Crowd:
    """See the module. One use."""

    def __init__(self, spec: RunSpec, options: Options) -> None:
        small = miniature(spec)
        stages = spec.stages.count
        self.options = options
        self.outcome = Outcome(
            options,
            stages,
            spec.micro_batch_tokens,
            tuple(options.micro_batch_s * cost for cost in small.costs),
            rounds=[0] * stages,
        )
        self._draws = options.draws()
        self._stage_bytes = max(small.stage_bytes)
        self._numbers = itertools.count()
        self._lives: dict[int, Life] = {}  # by machine, of those who are here
        self._peers: dict[int, Node] = {}
        self._moving: Node | None = None
        rng = random.Random(f"{options.seed}/policies")
        form, sequences = PayloadFormat.of(spec), spec.inner.micro_batch_sequences
        hidden = form.hidden_bytes(sequences, form.widest)
        rules = Rules(
            last=stages - 1,
            in_flight=spec.inner.in_flight,
            held_most=spec.limits.undecided_micro_batches if options.router == "shoal" else _UNLIMITED,
            weights_waiting=weights_in_stock(spec.inner.in_flight),
            forward_bytes=float(hidden + form.token_bytes(sequences)),
            backward_bytes=float(hidden),
            hop_bytes=float(hidden),
            adopts=options.recovery == "adopt",
            router=ROUTERS[options.router],
        )
        entrances = compiled() if options.peers * options.end_s >= COMPILED_FROM else PLAIN
        self.flow = Flow(rules, np.random.default_rng(rng.getrandbits(64)), entrances)
        self.places = Places(self.flow, stages, random.Random(rng.getrandbits(64)))
        self.shelves = Shelves(stages)
        self._asked = random.Random(rng.getrandbits(64))
        self.placer: Placer = SwarmPlacer(self.places, self.flow)
        if options.router != "swarm":
            self.placer = ShoalPlacer(
                self.places,
                self.shelves,
                self.outcome.stage_s,
                random.Random(rng.getrandbits(64)),
                window_s=spec.stages.rebalance_window_s,
                minimum_replicas=spec.stages.minimum_replicas,
                move_s=_DRAIN_S,
            )
        self._trace = blake3()

    def run(self, progress: Progress) -> None:
        """To the end of the measured time; fills the outcome."""
        flow, options, outcome = self.flow, self.options, self.outcome
        for place in range(options.peers):
            node = self._arrive()
            self._take(node, place % outcome.stages)
            self._online(node)
        if self.placer.window_s > 0:
            flow.at(self.placer.window_s, self._rebalance)
        every_s = options.end_s / SAMPLES
        before = begun = 0
        pieces = flow.pieces.copy()
        for look in range(1, SAMPLES + 1):
            flow.run(look * every_s)
            outcome.samples.append(self._sample((flow.decided - before) / every_s))
            if flow.now <= options.warmup_s:
                begun, pieces = flow.decided, flow.pieces.copy()
            before = flow.decided
            rates = [self.shelves.bytes_per_s(self._asked) for _ in range(_ASKED)]
            outcome.directory_bytes += statistics.fmean(rates) * options.peers * every_s
            progress(flow.now, options.end_s)
        outcome.micro_batches = flow.decided - begun
        work = np.array(outcome.stage_s) @ (flow.pieces - pieces) / PIECES
        outcome.begun, outcome.drained, outcome.thrown = map(float, work)
        outcome.lost, outcome.retries, outcome.reroutes = flow.lost, flow.retries, flow.reroutes
        outcome.directory_bytes += RECORD_BYTES * self.placer.newcomers_records
        outcome.trace = self._trace.hexdigest(length=16)

    # --- coming and going

    def _arrive(self) -> Node:
        """The next machine's peer, with a session before it."""
        number, now = next(self._numbers), self.flow.now
        machine = self._draws.machine(number)
        node = self._node(machine)
        download_s = self._download_s(machine) if number >= self.options.peers else 0.0
        self._lives[number] = Life(machine.speed, now + download_s)
        self.outcome.lives.append(self._lives[number])
        self.flow.at(now + machine.session_s, self._end, number)
        return node

    def _node(self, machine: Machine) -> Node:
        node = Node(machine.number, PeerId(f"12D3KooW{machine.number:044d}"), machine)
        self._peers[machine.number] = node
        self.places.arrive(node)
        return node

    def _download_s(self, machine: Machine) -> float:
        return self._stage_bytes / machine.download_bytes_per_s

    def _take(self, node: Node, stage: int) -> None:
        node.stage = stage
        node.service_s = node.machine.service_s(1.0, self.outcome.stage_s[stage])
        self.shelves.file(node, self.outcome.stage_s[stage] / node.service_s)

    def _online(self, node: Node) -> None:
        if node.state == "joining":
            node.state = "online"
            self._note("online", node)
            self.places.serve(node)
            if node.stage == 0:
                self.flow.drive(node)

    def _end(self, number: int) -> None:
        """A session is over; another machine takes the place."""
        node = self._peers.pop(number)
        self._lives.pop(number).gone_s = self.flow.now
        if node.machine.killed or node.state == "joining":
            self.outcome.kills += 1
            self._go(node)
        else:
            self.outcome.leaves += 1
            self._drain(node)
            self.flow.at(self.flow.now + _DRAIN_S, self._go, node)
        self.outcome.joins += 1
        joiner = self._arrive()
        self._take(joiner, self.placer.join(joiner, self.flow.now))
        self.flow.at(self.flow.now + _LOOK_S + self._download_s(joiner.machine), self._online, joiner)

    def _drain(self, node: Node) -> None:
        node.state = "draining"
        self.shelves.take_away(node)
        self.places.withdraw(node)

    def _go(self, node: Node) -> None:
        if node.state != "gone":
            self._note("gone", node)
            node.state = "gone"
            self.shelves.take_away(node)
            self.places.leave(node)

    # --- rebalancing

    def _rebalance(self) -> None:
        found = self.placer.move(self.flow.now)
        if found is not None and self._moving is None:
            node, target = found
            self._moving = node  # one at a time: LEAVE is granted so
            self.flow.at(self.flow.now + self._download_s(node.machine), self._move_out, node, target)
        self.flow.at(self.flow.now + self.placer.window_s, self._rebalance)

    def _move_out(self, node: Node, target: int) -> None:
        """The new stage is fetched: serve no more here."""
        if node.state != "online":
            self._moving = None
            return
        self._drain(node)
        self.flow.at(self.flow.now + _DRAIN_S, self._move_in, node, target)

    def _move_in(self, node: Node, target: int) -> None:
        self._moving = None
        if self._peers.get(node.number) is not node:
            return  # its session ended meanwhile
        self._go(node)
        self.outcome.moves += 1
        moved = self._node(node.machine)
        self._take(moved, target)
        self._online(moved)

    # --- measuring

    def _sample(self, rate: float) -> Sample:
        now, costs = self.flow.now, self.outcome.stage_s
        lives = (life for life in self._lives.values() if life.ready_s <= now)
        placed = (
            (stage, node.machine.speed)
            for stage, group in enumerate(self.places.groups)
            for node in group.nodes
        )
        return Sample(now, rate, ideal_rate((life.speed for life in lives), costs), capacities(placed, costs))

    def _note(self, what: str, node: Node) -> None:
        """Into the trace: two runs that decided alike until here have the same digest."""
        flow = self.flow
        state = f"{flow.now:.6f} {what} {node.number} {node.stage} {flow.decided} {flow.retries}"
        self._trace.update(state.encode())
