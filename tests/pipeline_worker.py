"""A peer as a process of its own, for the pipeline's fault matrix: a whole `Trainer`, at some stage.

A tiny model, random data, a lane that takes as long as it is told: members, pipeline, inner steps, rounds,
snapshots, moves and checkpoints are the real ones, on real sockets. It tells what it decided and applied
(`account`), the last time just before it dies, so that `pipeline_audit` can count over all lives.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3
from fault_line import MEET_S, LineWorker
from fault_orders import JsonObject, Order
from pipeline_terms import TERMS, Terms

from shoal.compression.codec import bytes_of
from shoal.dht.beats import Beat
from shoal.dht.view import Member
from shoal.protocol.faults import Action, Arming, Faults
from shoal.protocol.faults import freeze_this_process as freeze
from shoal.protocol.identity import PeerId
from shoal.training.lane import ThreadLane
from shoal.training.spec import RunSpec
from shoal.training.tenure import announced
from shoal.training.trainer import Trainer
from shoal.training.work import Work, paced

PACE_S = 0.06  # of a micro-batch on the lane of one replica
SLOW = 10.0  # times, of one that is slowed down
TOLD = (
    *("lost", "dropped", "reroute", "hedge", "adopt", "drain-cut", "checkpoint"),
    *("online", "moving", "prefetched", "move-cut"),
)
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
    """The replica. What is struck with a freeze may instead be made slow, leave, or wait (`do_arm`)."""

    def __init__(self, order: Order, writer: asyncio.StreamWriter) -> None:
        self._pace_s, self._slower = PACE_S, 1.0
        self._others: dict[str, str] = {}  # arming -> what happens instead of a freeze
        self._striking: Arming | None = None
        self._wanted = 0  # own micro-batches below this number are to be decided
        self._go_on = asyncio.Event()  # of what is held at a point
        self._terms: Terms | None = None
        self._living: asyncio.Task[None] | None = None
        self._folder = Path(order.directory or ".")
        super().__init__(order, writer)
        self.incarnation = order.incarnation * TERMS  # from the start above all of its earlier lives
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
        return self._terms.beat() if self._terms is not None else Beat()

    async def take_part(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        order = self.order
        terms = self._terms = Terms(
            self._spec,
            number=order.number,
            life=order.incarnation,
            moves=order.moves,
            spare_bytes=0 if order.moves else SPARE_BYTES,  # who guards a stage needs no copy of it to move
            transport=self.transport,
            members=self.members,
            make_lane=self._make_lane,
            announce=self._announce,
            event=self._event,
            rng=self._rng,
            folder=self._folder,
        )
        self._living = self.start(terms.run(self.stages[0]))
        await terms.online()

    def _announce(self, held: Mapping[int, str], incarnation: int) -> None:
        self._state, self.stages, self.states = announced(held)
        self.incarnation = incarnation
        self.say(event="stage", stage=self.stages[0])
        self.members.changed_now()

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
        if (trainer := self.serving) is not None and (driver := trainer.station.driver) is not None:
            driver.pause() if paused else driver.resume()

    async def do_decide(self) -> None:
        """Tell when all micro-batches begun until now are decided."""
        driver = trainer.station.driver if (trainer := self.serving) is not None else None
        self._wanted = self._decided() + (driver.in_flight if driver is not None else 0)
        self._look()

    async def do_release(self) -> None:
        """Who was held at a point goes on."""
        self._go_on.set()

    async def do_die(self) -> None:
        """SIGKILL, with an account of what it did."""
        self._leave_account()
        os.kill(os.getpid(), signal.SIGKILL)

    async def do_leave(self) -> None:
        """Begin to leave in order."""
        self.start(self._leave())

    async def do_account(self) -> JsonObject:
        """What holds now."""
        return self.account()

    # -- what it tells

    @property
    def serving(self) -> Trainer | None:
        """The trainer, while it serves a stage."""
        return self._terms.serving if self._terms is not None else None

    def account(self) -> JsonObject:
        """Applied micro-batches; while it serves a stage, what waits to be settled and the agreed state."""
        terms = self._terms.accounts() if self._terms is not None else []
        spans = [span for term in terms for found in term["applied"].values() for span in found]
        count = sum(stop - start for start, stop in spans)
        found: JsonObject = {"terms": terms, "micro_batches": count, "state": self._state, "stage": None}
        if (trainer := self.serving) is None:
            return found
        outer, status = trainer.outer, trainer.station.status()
        told = ("lost", "dropped", "in_flight", "owed", "undecided", "reroutes_s")
        return found | {
            **{key: status[key] for key in told if key in status},
            "stage": trainer.stage,
            "refused": sorted(map(str, outer.context.refused)),
            "height": outer.height,
            "head": outer.head.hex(),
            "state_root": outer.state_root.hex(),
            "anchor": blake3(bytes_of(outer.anchor)).hexdigest(),
            "guards": {copy.stage: copy.height for copy in trainer.heartbeat().guards},
        }

    def struck(self, arming: Arming, peer: PeerId) -> None:
        """A killed process leaves its account behind, since what is on the line may be lost with it."""
        self._striking = arming
        if arming.action is Action.KILL:
            self._leave_account()
        super().struck(arming, peer)

    def _leave_account(self) -> None:
        path = self._folder.with_name(f"{self._folder.name}-{self.order.incarnation}.account")
        path.write_text(json.dumps(self.account()))

    def _event(self, kind: str, data: dict[str, object]) -> None:
        if kind in TOLD:
            self.say(event="told", kind=kind, data=data, at_s=asyncio.get_running_loop().time())

    def _passed(self, step: str) -> None:
        if step == "chain.decided" and self._wanted:
            self._look()

    def _look(self) -> None:
        if self._decided(below=self._wanted) >= self._wanted:
            self._wanted = 0
            self.say(event="decided", at_s=asyncio.get_running_loop().time())

    def _decided(self, below: int = 1 << 62) -> int:
        """Own micro-batches, of the incarnation that drives now."""
        if self._terms is None or (trainer := self._terms.trainer) is None:
            return 0
        spans = trainer.ledger().get(f"{self.transport.me}/{self._terms.incarnation}", [])
        return sum(max(0, min(stop, below) - start) for start, stop in spans)

    # -- blows

    async def _freeze_or_other(self, peer: PeerId) -> None:
        match self._others.pop(str(self._striking), ""):
            case "leave":
                self.start(self._leave())
            case "slow":
                self._slower = SLOW
            case "hold":
                self._go_on.clear()
                await self._go_on.wait()
            case _:
                await freeze(peer)

    async def _leave(self) -> None:
        """As the daemon does: finish what is held, say goodbye, and go."""
        if self._terms is not None and self._living is not None:
            await self._terms.drain(DRAIN_S)
            self._living.cancel()
            await asyncio.gather(self._living, return_exceptions=True)
        self._leave_account()
        await self.members.leave()
        self.say(event="left")
        await self._writer.drain()
        self._writer.close()
