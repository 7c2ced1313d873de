"""What a worker of the pipeline's fault tests holds: a `Tenure` of whole trainers, as the daemon has one.

A lane and an incarnation for each stage that it comes to; what it applied at all of them is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fault_orders import JsonObject

from shoal.dht.beats import Beat, together
from shoal.dht.members import Members
from shoal.node.simulate.feed import RandomFeed
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.training.lane import ThreadLane
from shoal.training.methods import of_stage
from shoal.training.spec import RunSpec
from shoal.training.tenure import Tenure
from shoal.training.trainer import Trainer

TERMS = 1000  # of one process, at most: so many incarnations are its own
Event = Callable[[str, dict[str, object]], None]


@dataclass(slots=True)
class Held:
    """One stage of this process's, now or earlier."""

    stage: int
    incarnation: int
    applied: Mapping[str, list[tuple[int, int]]]  # once it has left


class Terms:
    """See the module. `run` until cancelled; `drain` before that to leave in order."""

    def __init__(
        self,
        spec: RunSpec,
        *,
        number: int,
        life: int,
        moves: bool,
        spare_bytes: int,
        transport: Transport,
        members: Members,
        make_lane: Callable[[], ThreadLane],
        announce: Callable[[Mapping[int, str], int], None],
        event: Event,
        rng: random.Random,
        folder: Path,
    ) -> None:
        """`announce`: what this process is at each of its stages, and as which incarnation."""
        self.trainer: Trainer | None = None
        self.held: list[Held] = []
        self._spec = spec
        self._first = life * TERMS
        self._moves = moves
        self._spare_bytes = spare_bytes
        self._transport = transport
        self._members = members
        self._make_lane = make_lane
        self._event = event
        self._rng = rng
        self._folder = folder
        self._feed = RandomFeed(spec, number)
        self._online = asyncio.Event()
        self._tenure = Tenure(
            spec,
            view=members.view,
            begin=self._begin,
            announce=lambda held: announce(held, self.incarnation),
            prefetch=self._prefetch,
            fits=lambda stages: True,
            event=self._tell,
            rng=rng,
            moves=moves,
        )

    @property
    def incarnation(self) -> int:
        """At the stage that it came to last, or is about to."""
        return self.held[-1].incarnation if self.held else self._first

    @property
    def serving(self) -> Trainer | None:
        """The trainer, while it serves."""
        return self.trainer if self._tenure.terms else None

    async def run(self, stage: int) -> None:
        await self._tenure.run(stage)

    async def online(self) -> None:
        """Until it serves its first stage."""
        await self._online.wait()

    async def drain(self, deadline_s: float) -> None:
        await self._tenure.drain(deadline_s)

    def beat(self) -> Beat:
        trainer = self.serving
        return self._tenure.complete(together([trainer.heartbeat()])) if trainer is not None else Beat()

    def accounts(self) -> list[JsonObject]:
        """What it applied, at each stage that it had."""
        if self.trainer is not None:
            self.held[-1].applied = self.trainer.ledger()
        return [
            {"stage": one.stage, "incarnation": one.incarnation, "applied": one.applied} for one in self.held
        ]

    @contextlib.asynccontextmanager
    async def _begin(self, stage: int) -> AsyncIterator[Trainer]:
        held = Held(stage, self._first + len(self.held), {})
        self.held.append(held)
        lane = self._make_lane()
        trainer = self.trainer = Trainer(
            self._spec,
            stage,
            transport=self._transport,
            members=self._members,
            lane=lane,
            offload=asyncio.to_thread,
            feed=self._feed if stage == 0 else None,
            me=self._transport.me,
            incarnation=held.incarnation,
            event=lambda kind, data: self._event(
                kind, {**data, "stage": stage, "incarnation": held.incarnation}
            ),
            rng=self._rng,
            data_dir=self._folder,
            fixed=not self._moves,
            spare_bytes=self._spare_bytes,
        )
        try:
            yield trainer
        finally:
            self._transport.withdraw(of_stage(self._transport.methods, stage))
            held.applied, self.trainer = trainer.ledger(), None
            await lane.close()

    async def _prefetch(self, stage: int, donors: Sequence[PeerId]) -> None:
        if self.trainer is not None:
            await self.trainer.prefetch(stage, donors)

    def _tell(self, kind: str, data: dict[str, object]) -> None:
        if kind == "online":
            self._online.set()
        self._event(kind, data)
