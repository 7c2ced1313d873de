"""The full simulation: every peer runs the real protocol, machines come and go, and the whole is measured.

Each of N places has a peer; when its session is over, by SIGKILL or in order, another machine takes the place
at once, so that N stay. What peers do is none of this module's business.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random

from shoal.dht.memory_directory import MemoryDirectoryHub
from shoal.node.simulate.account import Account, Living
from shoal.node.simulate.feed import RandomFeed
from shoal.node.simulate.ideal import capacities, ideal_rate
from shoal.node.simulate.machines import Machine
from shoal.node.simulate.membership import PaperMembership, simulated_key
from shoal.node.simulate.miniature import Miniature, miniature
from shoal.node.simulate.network import DrawnNetwork
from shoal.node.simulate.options import Options, filled_s
from shoal.node.simulate.outcome import SAMPLES, Life, Outcome, Progress, Sample, Stopwatch
from shoal.node.simulate.peer import SimulatedPeer, wall
from shoal.node.simulate.promises import Promises
from shoal.protocol import virtual_time
from shoal.protocol.errors import ShoalError
from shoal.protocol.identity import PeerId
from shoal.training.plan import make_plan
from shoal.training.recovery.guardians import guard_bytes
from shoal.training.spec import RunSpec
from shoal.training.work import paced

_ACCOUNT_S = 5.0
_DRAIN_S = 20.0  # as the daemon's
_AGAIN_S = 5.0  # until a machine replaces one that could not join
_CALM_S = 10.0  # after the measured time, for commits under way

log = logging.getLogger(__name__)


def simulate_swarm(
    spec: RunSpec, options: Options, progress: Progress = lambda done_s, all_s: None
) -> Outcome:
    """Run it. The same spec and options give the same outcome, its trace included, in every process."""
    small = miniature(spec)
    swarm = Swarm(spec, small, options, progress)
    with Stopwatch(swarm.outcome):
        virtual_time.run(swarm.run)
    return swarm.outcome


class Swarm:
    """See the module. One use."""

    def __init__(self, spec: RunSpec, small: Miniature, options: Options, progress: Progress) -> None:
        self.small = small
        self._spec = spec
        self.options = options
        self.network = DrawnNetwork(options.seed, small)
        self.peers: dict[PeerId, SimulatedPeer] = {}  # alive, those still joining among them
        self.account = Account()
        self.promises = Promises(
            small.spec.stages.count, filled_s(small.spec.stages.count, options.micro_batch_s)
        )
        self.outcome = Outcome(
            options,
            small.spec.stages.count,
            small.micro_batch_tokens,
            tuple(options.micro_batch_s * cost for cost in small.costs),
            rounds=[0] * small.spec.stages.count,
        )
        self._progress = progress
        self._draws = options.draws()
        self._machines: dict[PeerId, tuple[Machine, Life]] = {}
        self._numbers = itertools.count()
        self._run_id = small.spec.run_id()
        every, planned = small.spec.outer.snapshot_every, make_plan(small.spec).stages
        self._spare_bytes = max(guard_bytes(stage, every) for stage in planned)  # a copy of one more stage
        observer = PaperMembership(self._run_id, simulated_key(options.seed, -1), wall)
        self._hub = MemoryDirectoryHub(observer, wall, random.Random(options.seed + 1))

    async def run(self) -> None:
        """To the end of the measured time; fills the outcome."""
        options = self.options
        places = [asyncio.create_task(self._place(n)) for n in range(options.peers)]
        watch = asyncio.create_task(self._keep_account())
        try:
            await self._sample()
        finally:
            for task in places:
                task.cancel()
            await asyncio.gather(*places, return_exceptions=True)
        await asyncio.sleep(_CALM_S)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        self._conclude()
        for peer in list(self.peers.values()):
            await peer.kill()

    # --- coming and going

    async def _place(self, place: int) -> None:
        """One machine after the other, until cancelled; the last one stays."""
        while True:
            number = next(self._numbers)
            machine = self._draws.machine(number)
            if number >= self.options.peers:
                self.outcome.joins += 1
            peer = self._peer(number, machine)
            peer.task = asyncio.create_task(self._live(peer, machine), name=f"peer {number}")
            await asyncio.wait({peer.task}, timeout=machine.session_s)
            failed = peer.task.done()
            if machine.killed or failed:
                self._close(peer)
                self.promises.died(asyncio.get_running_loop().time(), peer.peer)
                await peer.kill()
                self.outcome.kills += not failed
            else:
                self.outcome.leaves += 1
                await peer.leave(_DRAIN_S)
                self._close(peer)
            if failed:
                self.outcome.failed_joins += 1
                await asyncio.sleep(_AGAIN_S)

    def _peer(self, number: int, machine: Machine) -> SimulatedPeer:
        key = simulated_key(self.options.seed, number)
        peer = SimulatedPeer(
            self.small.spec,
            number,
            membership=PaperMembership(self._run_id, key, wall),
            network=self.network,
            hub=self._hub,
            incarnation=number + 1,
            rng=random.Random(f"{self.options.seed}/peer/{number}"),
            planned=self._spec,
            neighbour_limit=self.options.neighbour_limit,
            spare_bytes=self._spare_bytes,
        )
        now = asyncio.get_running_loop().time()
        download_s = max(self.small.stage_bytes) / machine.download_bytes_per_s
        life = Life(machine.speed, now + download_s if number >= self.options.peers else now)
        self.outcome.lives.append(life)
        self.network.place(peer.peer, machine)
        self._machines[peer.peer] = machine, life
        self.peers[peer.peer] = peer
        return peer

    async def _live(self, peer: SimulatedPeer, machine: Machine) -> None:
        """A peer's whole life; ends early only if it cannot join."""
        try:
            await peer.start()
            stage = await peer.settle()
            feed = RandomFeed(self.small.spec, peer.number)
            durations_s = [paced(self._service_s(machine, at)) for at in range(self.outcome.stages)]
            await peer.live_at(stage, durations_s.__getitem__, feed, most=self.options.stages_most)
        except ShoalError as error:
            log.info("peer %d could not go on: %s", peer.number, error)

    def _service_s(self, machine: Machine, stage: int) -> float:
        return machine.service_s(self.options.micro_batch_s, self.small.costs[stage])

    def _close(self, peer: SimulatedPeer) -> None:
        """Take what is to be known of a peer that goes."""
        now = asyncio.get_running_loop().time()
        del self.peers[peer.peer]
        self._machines.pop(peer.peer)[1].gone_s = now
        self.network.remove_machine(peer.peer)
        self._close_past(now, peer.peer, peer)
        for stage, trainer in peer.replicas.items():
            self.account.close(now, peer.peer, stage, trainer.decisions)
        self._audit(peer)
        self._harvest(peer)

    # --- measuring

    async def _sample(self) -> None:
        """A look now and then, until the end."""
        options, outcome = self.options, self.outcome
        loop = asyncio.get_running_loop()
        every_s = options.end_s / SAMPLES
        before = begun = 0
        for look in range(1, SAMPLES + 1):
            await asyncio.sleep(look * every_s - loop.time())
            self._look()
            now, decided = loop.time(), self.account.decided
            speeds = [machine.speed for machine, life in self._machines.values() if life.ready_s <= now]
            placed = [
                (stage, self._machines[peer.peer][0].speed / len(peer.replicas))
                for peer in self.peers.values()
                if peer.online
                for stage in peer.replicas
            ]
            outcome.samples.append(
                Sample(
                    now,
                    (decided - before) / every_s,
                    ideal_rate(speeds, outcome.stage_s),
                    capacities(placed, outcome.stage_s),
                )
            )
            if now <= options.warmup_s:
                begun = decided
            before = decided
            outcome.micro_batches = decided - begun
            self._progress(now, options.end_s)

    async def _keep_account(self) -> None:
        while True:
            await asyncio.sleep(_ACCOUNT_S)
            self._look()

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for name, peer in self.peers.items():
            self._close_past(now, name, peer)
        self.account.look(now, self._ledgers())
        self.promises.look(now, self.peers, self.account.decided)
        for peer in self.peers.values():
            for stage, trainer in peer.replicas.items():
                self.outcome.rounds[stage] = max(self.outcome.rounds[stage], trainer.outer.height)

    def _ledgers(self) -> Living:
        return {
            name: {stage: trainer.decisions for stage, trainer in peer.replicas.items()}
            for name, peer in self.peers.items()
        }

    def _close_past(self, now: float, name: PeerId, peer: SimulatedPeer) -> None:
        """The books of stages that this peer has left."""
        for stage, ledger in peer.past:
            self.account.close(now, name, stage, ledger)
            self.outcome.moves += 1
        peer.past.clear()

    def _audit(self, peer: SimulatedPeer) -> None:
        for trainer in peer.replicas.values():
            outer = trainer.outer
            self.promises.close(peer.peer, outer, outer.context.incarnation, trainer.weights.inner_steps)

    def _harvest(self, peer: SimulatedPeer) -> None:
        outcome = self.outcome
        for at_s, kind, data in peer.events:
            match kind:
                case "reroute":
                    outcome.reroutes.append((at_s, float(str(data["seconds"]))))
                case "retry":
                    outcome.retries += 1
                case "adopt":
                    outcome.adopted += 1
                case "hedge":
                    outcome.hedges += 1
                case "stream-adopted":
                    outcome.adopted_streams += 1
                case "fork":
                    outcome.forks += 1
                case "stage-rebuilt":
                    outcome.setbacks.append((at_s, int(str(data["stage"])), int(str(data["rounds"]))))
        peer.events.clear()

    def _conclude(self) -> None:
        outcome, account = self.outcome, self.account
        self._look()
        for peer in self.peers.values():
            self._audit(peer)
            self._harvest(peer)
        outcome.lost, outcome.unexplained = account.lost, account.unexplained
        outcome.duplicated = account.duplicated(self._ledgers())
        outcome.broken = self.promises.broken
        if outcome.duplicated or outcome.unexplained:
            outcome.broken.append(
                f"P2: {outcome.duplicated} micro-batches applied twice, {outcome.unexplained} lost by nobody"
            )
        for method, count in self.network.bytes_by_method.items():
            use = _use(method)
            outcome.bytes_by_use[use] = outcome.bytes_by_use.get(use, 0.0) + count
        outcome.directory_bytes = self._hub.bytes
        outcome.trace = self.network.trace_digest()


def _use(method: str) -> str:
    """What a transport method is for, in a word."""
    name = method.rpartition(".")[2]
    match name:
        case "propagate" | "commit":
            return "pipeline"
        case "infer":
            return "scoring"
        case "beat":
            return "membership"
        case "manifest" | "chunks" | "state" | "entries":
            return "recovery"
    return "rounds" if method.startswith("outer.") else name
