"""One peer in virtual time: members, trainer and all they run on, over memory links.

The twin of daemon, presence and trainee in one: `swarm` starts, kills and sends away many of them, tests a
few. It knows nothing of churn or measurements.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from shoal.dht.beats import Beat, together
from shoal.dht.directory import PeerRecord
from shoal.dht.members import Members
from shoal.dht.memory_directory import MemoryDirectoryHub
from shoal.dht.neighbours import SMALL_SWARM
from shoal.dht.records import RecordBook
from shoal.node.placing import meet, take_stage
from shoal.protocol.admission import Membership
from shoal.protocol.contacts import ContactBook
from shoal.protocol.limits import RECORD_TTL_S
from shoal.protocol.memory_transport import MemoryNetwork
from shoal.protocol.transport import Transport
from shoal.training.checkpoint.manifest import CHECKPOINTS_FOLDER, START_FOLDER
from shoal.training.checkpoint.share import Shelf
from shoal.training.feed import Feed
from shoal.training.lane import InlineLane
from shoal.training.methods import of_stage
from shoal.training.partition import spec_costs
from shoal.training.pipeline.ledger import Ledger
from shoal.training.spec import RunSpec
from shoal.training.tenure import Tenure, announced
from shoal.training.trainer import Trainer
from shoal.training.work import Work

_TERMS = 1_000_000  # added to the incarnation at each move: more than a world starts processes
EPOCH = 1_800_000_000.0  # Unix time at which virtual time begins


def wall() -> float:
    """Unix seconds of the simulated world, moving with the virtual clock."""
    return EPOCH + asyncio.get_running_loop().time()


async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    """A trainer's `offload`: virtual time has no threads, and other work takes none of it."""
    return function(*arguments)


def same_transport(transport: Transport) -> Transport:
    return transport


class SimulatedPeer:
    """One process: `start`, `settle` or any stage, `train_at`, `run`; in the end `kill` or `leave`."""

    def __init__(
        self,
        spec: RunSpec,
        number: int,
        *,
        membership: Membership,
        network: MemoryNetwork,
        hub: MemoryDirectoryHub,
        incarnation: int,
        rng: random.Random,
        clock: Callable[[], float] = wall,
        wrap: Callable[[Transport], Transport] = same_transport,
        neighbour_limit: int = SMALL_SWARM,
        spare_bytes: int = 0,
        planned: RunSpec | None = None,
    ) -> None:
        """`number` names it for people. `planned`: the run whose costs moves go by, if not `spec`'s.

        `spare_bytes`: of memory, for copies of other stages.
        """
        self.number = number
        self.peer = membership.key.peer
        self.incarnation = incarnation
        self.state = "joining"
        self.stages: tuple[int, ...] = ()
        self.states: tuple[str, ...] = ()
        self.trainers: dict[int, Trainer] = {}  # by stage, in the order in which it came to them
        self.events: list[tuple[float, str, dict[str, object]]] = []
        self._over: set[int] = set()  # stages of which the replica has ended
        self.tenure: Tenure | None = None
        self.past: list[tuple[int, Ledger]] = []  # stages held before, and what was decided there
        self.task: asyncio.Task[None] | None = None
        self._spec = spec
        self._planned = planned or spec
        self._spare_bytes = spare_bytes
        self._membership = membership
        self._network = network
        self._rng = rng
        self.transport = wrap(network.transport(self.peer, membership.me.roles))
        self.members = Members(
            transport=self.transport,
            directory=hub.directory(self.peer, membership),
            membership=membership,
            contacts=ContactBook(),
            record_book=RecordBook(membership),
            make_record=self._record,
            make_beat=self._beat,
            clock=clock,
            rng=random.Random(rng.getrandbits(64)),
            neighbour_limit=neighbour_limit,
        )

    @property
    def stage(self) -> int:
        """Held, or being joined."""
        return self.stages[0]

    @property
    def online(self) -> bool:
        return self.state == "online"

    @property
    def served(self) -> bool:
        """Whether it ever came to hold its stage."""
        return self.state in ("online", "draining")

    def announce(self, state: str, stages: tuple[int, ...], states: tuple[str, ...] = ()) -> None:
        """Tell everybody what this peer does from now on."""
        self.state, self.stages, self.states = state, stages, states
        self.members.changed_now()

    async def start(self, stage: int | None = None) -> None:
        """Be there; `stage`: announced from the beginning."""
        self.stages = () if stage is None else (stage,)
        await self.transport.start()
        await self.members.start()

    async def settle(self) -> int:
        """Find the stage that needs it most."""
        await meet(self.members)
        return await take_stage(self.members, self.announce, spec_costs(self._planned))

    async def train_at(
        self,
        stage: int,
        duration_s: Callable[[Work], float],
        feed: Feed | None,
        data_dir: Path | None = None,
        imported: Sequence[Path] = (),
    ) -> None:
        """Reach the stage's state and serve. `duration_s`: what each kind of work takes of the lane.

        `data_dir`: its folder; without it nothing is written. Raises StageEmpty.
        """
        if data_dir is not None:
            folders = [*imported, data_dir / CHECKPOINTS_FOLDER, data_dir / START_FOLDER]
            Shelf(folders, inline).serve(self.transport)
        self._make_trainer(
            stage, InlineLane(duration_s), self.incarnation, feed, data_dir, imported, fixed=True
        )
        await self.trainer.recover()
        self.announce("online", (stage,))

    async def run(self) -> None:
        """Train until cancelled."""
        await self.trainer.run()

    async def live_at(
        self,
        stage: int,
        durations_s: Callable[[int], Callable[[Work], float]],  # at each stage
        feed: Feed | None,
        data_dir: Path | None = None,
        most: int = 1,
    ) -> None:
        """`train_at` and `run` in one, beginning with this stage; it moves when the plan says so.

        `most`: stages that it holds at once, on one lane with the durations of the first."""
        incarnation = self.incarnation - _TERMS
        lane: InlineLane

        @contextlib.asynccontextmanager
        async def begin(at: int) -> AsyncIterator[Trainer]:
            nonlocal incarnation, lane
            incarnation += _TERMS
            self._close_past()
            if not self.trainers:
                self.incarnation, lane = incarnation, InlineLane(durations_s(at))
            trainer = self._make_trainer(at, lane, incarnation, feed, data_dir, (), fixed=False, most=most)
            killed = False  # then it stays as it was
            try:
                yield trainer
            except asyncio.CancelledError:
                killed = True
                raise
            finally:
                if not killed:
                    self._end(at)

        tenure = self.tenure = Tenure(
            self._planned,
            view=self.members.view,
            begin=begin,
            announce=lambda held: self.announce(*announced(held)),
            prefetch=lambda at, donors: self.trainer.prefetch(at, donors),
            fits=lambda stages: True,
            event=self._note,
            rng=random.Random(self._rng.getrandbits(64)),
            most=most,
        )
        await tenure.run(stage)

    def _make_trainer(
        self,
        stage: int,
        lane: InlineLane,
        incarnation: int,
        feed: Feed | None,
        data_dir: Path | None,
        imported: Sequence[Path],
        fixed: bool,
        most: int = 1,
    ) -> Trainer:
        trainer = Trainer(
            self._spec,
            stage,
            transport=self.transport,
            members=self.members,
            lane=lane,
            offload=inline,
            feed=feed if stage == 0 else None,
            me=self.peer,
            incarnation=incarnation,
            event=self._note,
            rng=random.Random(self._rng.getrandbits(64)),
            data_dir=data_dir,
            fixed=fixed,
            imported=imported,
            spare_bytes=self._spare_bytes,
            stages_most=most,
            guards=lambda: next(iter(self.trainers), stage) == stage,
        )
        self.trainers[stage] = trainer
        return trainer

    @property
    def trainer(self) -> Trainer:
        """Of the first of its stages."""
        return next(iter(self.trainers.values()))

    def _end(self, stage: int) -> None:
        self.transport.withdraw(of_stage(self.transport.methods, stage))
        self._over.add(stage)
        if len(self.trainers) > 1:
            self._close_past()

    def _close_past(self) -> None:
        """What was decided at stages that it has left is told once."""
        for stage in self._over:
            self.past.append((stage, self.trainers.pop(stage).decisions))
        self._over.clear()

    async def leave(self, drain_s: float) -> None:
        """Finish what is held, say goodbye and go; `run` goes on meanwhile."""
        if self.online:
            self.announce("draining", self.stages)
            await asyncio.gather(*(trainer.drain(drain_s) for trainer in self.trainers.values()))
        await self._stop()
        await self.members.leave()
        await self.members.close()
        await self.transport.close()

    async def kill(self) -> None:
        """SIGKILL: connections break, nothing is said."""
        self._network.kill(self.peer)
        await self._stop()
        await self.members.close()

    async def reach(self, height: int) -> None:
        """Until the log is that high."""
        await self.trainer.outer.wait_until(lambda: self.trainer.outer.height >= height)

    def heard(self, kind: str) -> list[dict[str, object]]:
        """What the trainer told of this kind."""
        return [data for _, found, data in self.events if found == kind]

    @property
    def replicas(self) -> dict[int, Trainer]:
        """By stage, those that serve or served last."""
        return {stage: trainer for stage, trainer in self.trainers.items() if trainer.recovered}

    async def _stop(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    def _note(self, kind: str, data: dict[str, object]) -> None:
        self.events.append((asyncio.get_running_loop().time(), kind, data))

    def _beat(self) -> Beat:
        if not self.served:
            return Beat()
        beat = together([trainer.heartbeat() for trainer in self.replicas.values()])
        return self.tenure.complete(beat) if self.tenure is not None else beat

    def _record(self) -> PeerRecord:
        return PeerRecord(
            peer=self.peer,
            incarnation=self.incarnation,
            sequence=0,
            issued_unix_s=0.0,
            ttl_s=RECORD_TTL_S,
            state=self.state,
            stages=self.stages,
            states=self.states,
            name=f"p{self.number}",
            addresses=("127.0.0.1:5000",),
            chain=self._membership.chain,
            device="cpu",
            tokens_per_s=0.0,
            version="0",
        )
