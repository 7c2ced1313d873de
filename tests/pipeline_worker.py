"""One replica of one stage as a process of its own, for the pipeline's fault matrix: a whole `Trainer`.

A tiny model, random data, a lane that takes as long as it is told: members, pipeline, inner steps, rounds,
snapshots and checkpoints are the real ones, on real sockets. It tells what it decided and applied
(`account`), the last time just before it dies, so that `pipeline_audit` can count over all lives.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3
from fault_line import MEET_S, LineWorker
from fault_orders import JsonObject, Order

from shoal.compression.codec import bytes_of
from shoal.dht.beats import Beat
from shoal.dht.view import Member
from shoal.node.simulate.feed import RandomFeed
from shoal.protocol.faults import Action, Arming, Faults
from shoal.protocol.faults import freeze_this_process as freeze
from shoal.protocol.identity import PeerId
from shoal.training.lane import ThreadLane, Work, paced
from shoal.training.spec import RunSpec
from shoal.training.trainer import Trainer

PACE_S = 0.06  # of a micro-batch on the lane of one replica
SLOW = 10.0  # times, of one that is slowed down
DRAIN_S = 30.0  # for one that leaves
SPARE_BYTES = 1 << 30  # for copies of other stages, each of which counts a long log


class WatchedFaults(Faults):
    """Tells of every step that is passed, armed or not."""

    def __init__(self, passed: Callable[[str], None], **settings: Any) -> None:
        super().__init__(**settings)
        self.passed = passed

    async def passing(self, point: str, me: PeerId, remote: PeerId | None = None) -> Action | None:
        self.passed(point)
        return await super().passing(point, me, remote)


class PipelineWorker(LineWorker):
    """The replica. What is struck with a freeze may instead be made slow, or leave (`do_arm`)."""

    def __init__(self, order: Order, writer: asyncio.StreamWriter) -> None:
        self._pace_s, self._slower = PACE_S, 1.0
        self._others: dict[str, str] = {}  # arming -> what happens instead of a freeze
        self._striking: Arming | None = None
        self._wanted = 0  # own micro-batches below this number are to be decided
        self._trainer: Trainer | None = None
        self._training: asyncio.Task[None] | None = None
        self._folder = Path(order.directory or ".")
        super().__init__(order, writer)
        self._spec = RunSpec.model_validate(order.spec)

    def _make_faults(self) -> WatchedFaults:
        return WatchedFaults(
            self._passed,
            freeze=self._freeze_or_other,
            permit=self._permit,
            tell=self.struck,
            seed=self.order.seed + self.order.number,
        )

    def _make_lane(self) -> ThreadLane:
        return ThreadLane(least_s=self._least_s)

    def _least_s(self, kind: Work) -> float:
        return paced(self._pace_s)(kind) * self._slower

    def serve(self) -> None:
        """Nothing before it has recovered."""

    def is_here(self, member: Member) -> bool:
        return member.beat is not None

    async def do_meet(self, peers: list[PeerId]) -> None:
        """Return when all of these are alive here and take part, and nobody else is."""
        await super().do_meet(peers)
        others = [peer for peer in peers if peer != self.transport.me]
        await self.members.wait_for(
            lambda view: all((m := view.get(peer)) is not None and m.state == "online" for peer in others),
            MEET_S,
        )

    def beat(self) -> Beat:
        return self._trainer.heartbeat() if self._trainer is not None and self._state != "joining" else Beat()

    async def take_part(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(
            self._spec,
            self.stage,
            transport=self.transport,
            members=self.members,
            lane=self.lane,
            offload=asyncio.to_thread,
            feed=RandomFeed(self._spec, self.order.number) if self.stage == 0 else None,
            me=self.transport.me,
            incarnation=self.order.incarnation,
            event=self._event,
            rng=self._rng,
            data_dir=self._folder,
            fixed=True,
            spare_bytes=SPARE_BYTES,
        )
        self._trainer = trainer
        await trainer.recover()
        self.announce("online")
        self._training = self.start(trainer.run())

    # -- commands

    async def do_arm(self, arming: str, once: str, other: str = "") -> None:
        """Also what says "freeze" for something else: "leave" or "slow"."""
        self._others[str(Arming.parse(arming))] = other
        await super().do_arm(arming, once)

    async def do_pace(self, seconds: float) -> None:
        """A micro-batch takes so long from now on, and nobody is slow any more."""
        self._pace_s, self._slower = seconds, 1.0

    async def do_pause(self, paused: bool) -> None:
        """Begin no further micro-batch; those in flight finish."""
        if (driver := self.trainer.station.driver) is not None:
            driver.pause() if paused else driver.resume()

    async def do_decide(self) -> None:
        """Tell when all micro-batches begun until now are decided."""
        if (driver := self.trainer.station.driver) is not None:
            self._wanted = self._decided() + driver.in_flight
            self._look()

    async def do_account(self) -> JsonObject:
        """What holds now."""
        return self.account()

    # -- what it tells

    @property
    def trainer(self) -> Trainer:
        """Raises RuntimeError before it has one."""
        if self._trainer is None:
            raise RuntimeError("it has not joined")
        return self._trainer

    def account(self) -> JsonObject:
        """Applied micro-batches, what waits to be settled, and the agreed state."""
        station, outer = self.trainer.station, self.trainer.outer
        status = station.status()
        told = ("lost", "dropped", "in_flight", "owed", "undecided", "micro_batches", "reroutes_s")
        return {
            "applied": self.trainer.ledger(),
            **{key: status[key] for key in told if key in status},
            "height": outer.height,
            "head": outer.head.hex(),
            "state_root": outer.state_root.hex(),
            "anchor": blake3(bytes_of(outer.anchor)).hexdigest(),
            "guards": {copy.stage: copy.height for copy in self.trainer.heartbeat().guards},
        }

    def struck(self, arming: Arming, peer: PeerId) -> None:
        """A killed process leaves its account behind, since what is on the line may be lost with it."""
        self._striking = arming
        if arming.action is Action.KILL and self._trainer is not None:
            self._leave_account()
        super().struck(arming, peer)

    def _leave_account(self) -> None:
        path = self._folder.with_name(f"{self._folder.name}-{self.order.incarnation}.account")
        path.write_text(json.dumps(self.account()))

    def _event(self, kind: str, data: dict[str, object]) -> None:
        if kind in ("lost", "dropped", "reroute", "hedge", "adopt", "drain-cut", "checkpoint"):
            self.say(event="told", kind=kind, data=data, at_s=asyncio.get_running_loop().time())

    def _passed(self, step: str) -> None:
        if step == "chain.decided" and self._wanted:
            self._look()

    def _look(self) -> None:
        if self._wanted and self._decided(below=self._wanted) >= self._wanted:
            self._wanted = 0
            self.say(event="decided", at_s=asyncio.get_running_loop().time())

    def _decided(self, below: int = 1 << 62) -> int:
        spans = self.trainer.ledger().get(f"{self.transport.me}/{self.order.incarnation}", [])
        return sum(max(0, min(stop, below) - start) for start, stop in spans)

    # -- blows

    async def _freeze_or_other(self, peer: PeerId) -> None:
        match self._others.pop(str(self._striking), ""):
            case "leave":
                self.start(self._leave())
            case "slow":
                self._slower = SLOW
            case _:
                await freeze(peer)

    async def _leave(self) -> None:
        """As the daemon does: finish what is held, say goodbye, and go."""
        self.announce("draining")
        await self.trainer.drain(DRAIN_S)
        if self._training is not None:
            self._training.cancel()
            await asyncio.gather(self._training, return_exceptions=True)
        self._leave_account()
        await self.members.leave()
        self.say(event="left")
        await self._writer.drain()
        self._writer.close()
