"""One replica of one stage, put together: weights, pipeline, rounds, recovery, serving.

The daemon makes one and runs it; the simulator makes many. The trainer decides nothing by itself: it connects
the parts, and drains them in order when the peer leaves. What it says of itself is in `report`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shoal.dht.beats import Beat
from shoal.dht.members import Members
from shoal.protocol.faults import define
from shoal.protocol.faulty_transport import point
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.training.amended import Amended
from shoal.training.checkpoint.replica import StageCheckpoints
from shoal.training.data.stream_book import StreamBook
from shoal.training.decisions import DecisionLog
from shoal.training.feed import Feed
from shoal.training.held_out import HeldOut
from shoal.training.lane import Lane
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.neighbours import MemberReplicas, group_members, may_hold, met, stage_guardians
from shoal.training.outer.service import GroupMember, Outer
from shoal.training.outer.snapshot import Inherited
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.compute import StageCompute
from shoal.training.pipeline.inference import InferenceHop
from shoal.training.pipeline.ledger import Ledger
from shoal.training.pipeline.station import Station
from shoal.training.pipeline.successors import Event
from shoal.training.reading import Reading
from shoal.training.recovery.guarding import Guarding
from shoal.training.recovery.left_stages import LeftStages
from shoal.training.recovery.lost_stage import LostStage
from shoal.training.recovery.moments import MomentsDonor, take_moments
from shoal.training.recovery.prefetch import prefetch
from shoal.training.report import Progress, Report
from shoal.training.serving.replica import ServedStage
from shoal.training.spec import RunSpec
from shoal.training.weights import Weights, learning_rate

if TYPE_CHECKING:
    from shoal.training.devices.gang import Gang

_ENTERING, _ENTERED = define("stage.entering"), define("stage.entered")
_DRAINING, _EMPTIED, _DRAINED = define("drain.begun"), define("drain.emptied"), define("drain.ended")
Offload = Callable[..., Awaitable[Any]]


class Trainer:
    """A replica. `recover` brings it to the group's state and serves; `run` trains until cancelled."""

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        *,
        transport: Transport,
        members: Members,
        lane: Lane,
        offload: Offload,
        disk: Offload | None = None,  # for large writes
        feed: Feed | None,  # needed at the first stage
        me: PeerId,
        incarnation: int,
        event: Event,
        rng: random.Random,
        device: str = "cpu",
        host_optimizer: bool = False,  # optimizer and float32 weights in the machine's memory
        gang: Gang | None = None,  # of several devices, `device` being the first; it serves by itself
        data_dir: Path | None = None,
        fixed: bool = False,  # it stays at this stage
        imported: Sequence[Path] = (),  # folders of checkpoints, one of which the run may start from
        spare_bytes: int = 0,  # memory for copies of other stages
        stages_most: int = 1,  # that this peer may hold
        guards: Callable[[], bool] = lambda: True,  # of this peer's replicas it is the one that keeps them
        session_bytes: int = 512 << 20,  # and for inference sessions
        decisions: DecisionLog | None = None,
    ) -> None:
        self.recovered = False
        self.decisions = Ledger()  # what was decided here, for whoever checks it from outside
        self._decision_log = decisions
        self.spec = spec
        self.stage = stage
        self._transport = transport
        self._members = members
        self._lane = lane
        self._offload = offload
        self._disk = disk or offload
        self._feed = feed
        self._me = me
        self._incarnation = incarnation
        self._event = event
        self._rng = rng
        self._device = device
        self._host_optimizer = host_optimizer
        self._gang = gang
        self._data_dir = data_dir
        self._fixed = fixed
        self._spare_bytes = spare_bytes
        self._guards = guards
        self._stages_most = stages_most
        self._replicas = MemberReplicas(members)
        self._amended = Amended(spec, members.amendments)
        self.layout = stage_layout(spec, stage_ranges(spec)[stage])
        self._checkpoints: StageCheckpoints | None = None
        if data_dir is not None:
            self._checkpoints = StageCheckpoints(
                spec,
                stage,
                self.layout,
                transport=transport,
                members=members,
                folder=data_dir,
                imported=imported,
                offload=self._disk,
                event=event,
                rng=random.Random(rng.getrandbits(64)),
            )
        self.serving = ServedStage(
            spec,
            stage,
            self.layout,
            transport=transport,
            lane=lane,
            device=device,
            session_bytes=session_bytes,
            introduced=members.introduced,
        )
        self._book = StreamBook()
        self._reading: Reading | None = None  # of a driver
        self._held_out: HeldOut | None = None  # of a driver

    @property
    def layers(self) -> range:
        """The layers this stage holds."""
        return self.layout.layers

    def _compute(self, initial: torch.Tensor) -> StageCompute:
        """What trains: on this device or on all of them."""
        rate, on_host = self._learning_rate, self._host_optimizer
        if self._gang is not None:
            lane = self._lane
            return self._gang.replica(self.spec, self.stage, initial, lane, rate, host_optimizer=on_host)
        weights = Weights(self.spec, self.layout, initial, self._lane, self._device, host_optimizer=on_host)
        return StageCompute(self.spec, StageModel(self.spec, self.layout), weights, self._device, rate)

    async def recover(self) -> None:
        """Build the stage, bring it to the group's log head, and register everything this replica serves.

        Raises StageEmpty when the group has state but no donor answers.
        """
        await point(self._transport, _ENTERING)
        start = await self._checkpoints.start() if self._checkpoints is not None else None
        if start is not None:
            initial = start.weights
            inherited = Inherited(start.momentum, start.log_tokens, start.positions)
        else:
            initial, inherited = await self._offload(genesis, self.spec, self.layout), None
        compute = await self._offload(self._compute, initial)
        self.weights: Weights = compute.weights
        self.outer = Outer(
            self.spec,
            self.stage,
            me=self._me,
            incarnation=self._incarnation,
            transport=self._transport,
            weights=self.weights,
            genesis=initial,
            peers=self._group,
            suspect=self._replicas.suspect,
            offload=self._offload,
            disk=self._disk,
            positions=self._book.at,
            first_stage_head=self._first_stage_head,
            event=self._outer_event,
            rng=random.Random(self._rng.getrandbits(64)),
            guardians=lambda: stage_guardians(self._members, self.stage),
            directory=self._data_dir,
            inherited=inherited,
            decisions=self._decision_log,
            amended=self._amended,
            meet=self._members.meet,
            holds=lambda peer: may_hold(self._members.view(), self.stage, peer),
        )
        self._progress = Progress(self.outer, self.weights, self.serving, self._lane, fixed=self._fixed)
        self._guarding = Guarding(
            self.outer.context, self._members, self._spare_bytes, self._data_dir, self._guards
        )
        self._left_stages = LeftStages(
            self.outer.context, self._members, self._data_dir, self._guards, self._guarding.occupied
        )
        async with contextlib.AsyncExitStack() as unfinished:
            unfinished.push_async_callback(self.outer.close)  # a peer may go on without this stage
            await met(self._members, self.stage)
            await self.outer.recover()
            await self._restore()
            await LostStage(
                self.outer.context, self.layout, initial, self.outer, self._members.view, self._search
            ).resolve()
            if self._checkpoints is None or not await self._checkpoints.attach(self.outer, self.weights):
                await self._take_moments()
            unfinished.pop_all()
        if self._feed is not None:
            self._reading = Reading(self._feed, self._book, self.outer, self._members.view, self._event)
        self.station = Station(
            self.spec,
            self.stage,
            me=self._me,
            incarnation=self._incarnation,
            transport=self._transport,
            replicas=self._replicas,
            compute=compute,
            lane=self._lane,
            ledger=self.decisions,
            stepped=self.outer.stepped,
            added=self._book.add,
            event=self._event,
            rng=self._rng,
            decisions=self._decision_log,
            stages=self._stages_most,
        )
        self.station.serve()
        inference = InferenceHop(
            self.spec,
            self.stage,
            transport=self._transport,
            replicas=self._replicas,
            model=StageModel(self.spec, self.layout),
            lane=self._lane,
            anchor=self.outer.whole_anchor,
            rng=self._rng,
        )
        inference.serve()
        if self._feed is not None:
            self._held_out = HeldOut(
                self._feed.held_out(),
                inference.score,
                self._is_scorer,
                lambda: self.outer.tokens,
                self._event,
                self._rng,
            )
        self.outer.watch_snapshots(lambda kept: self.serving.versions.publish(kept.state.head, kept.anchor))
        self.serving.serve()
        MomentsDonor(self.stage, self._transport, self.weights, self._offload).serve()
        self.outer.serve()
        self._report = Report(
            layout=self.layout,
            progress=self._progress,
            outer=self.outer,
            weights=self.weights,
            station=self.station,
            lane=self._lane,
            serving=self.serving,
            guarding=self._guarding,
            book=self._book,
            reading=self._reading,
            held_out=self._held_out,
            checkpoints=self._checkpoints,
        )
        self.recovered = True
        await point(self._transport, _ENTERED)

    async def _search(self) -> None:
        """Once more for the stage's state, wherever it may have turned up."""
        await self.outer.reach()
        await self._restore()

    async def _restore(self) -> None:
        if self._checkpoints is not None and self.outer.height == 0:
            await self._checkpoints.restore(self.outer)

    async def _take_moments(self) -> None:
        """A joiner of a run that has begun: what the others' optimizers know."""
        if self.spec.inner.optimizer != "adamw" or not self.outer.height:
            return
        donors = [m.peer for m in self._members.view().online(self.stage) if m.peer != self._me]
        moments = await take_moments(self.outer.context, self._rng.sample(donors, len(donors)))
        if moments is not None:
            await self.weights.restore(moments)

    async def run(self) -> None:
        """Train until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.outer.run())
            tasks.create_task(self._guarding.run())
            tasks.create_task(self._left_stages.run())
            tasks.create_task(self.serving.sessions.run())
            tasks.create_task(self._obey())
            if self._checkpoints is not None:
                tasks.create_task(self._checkpoints.run())
            if self._reading is not None:
                tasks.create_task(self._reading.streams.run())
            tasks.create_task(
                self.station.run(self._reading.next_batch if self._reading is not None else None)
            )
            if self._held_out is not None:
                tasks.create_task(self._held_out.run())

    async def _obey(self) -> None:
        """A driver begins nothing while the run is paused; what is in flight finishes, rounds go quiet."""
        driver = self.station.driver
        with self._amended.watch() as changed:
            while driver is not None:
                changed.clear()
                if self._amended.paused:
                    driver.pause()
                else:
                    driver.resume()
                await changed.wait()

    async def prefetch(self, stage: int, donors: Sequence[PeerId]) -> None:
        """Another stage's newest snapshot to the own disk. Raises NotHere or StorageError."""
        if self._data_dir is None or self._guarding.holds(stage):  # its folder has what it guards
            return
        layout = stage_layout(self.spec, stage_ranges(self.spec)[stage])
        context = self.outer.context.beside(stage, layout.size)
        height = await prefetch(context, donors, self._data_dir)
        self._event("prefetched", {"stage": stage, "height": height})

    async def permission(self, hurry: Callable[[], bool]) -> None:
        """Returns when the group lets this replica go; `hurry`: whether the next round shall be at once."""
        await self.outer.permission(hurry)

    async def stop_guarding(self, stage: int) -> None:
        """This peer is about to hold that stage, too; what it has of it stays on its disk."""
        await self._guarding.stop_at(stage)

    async def drain(self, deadline_s: float) -> None:
        """Leave in order: take nothing new, finish what is held, contribute the last delta."""
        self.station.leave()
        try:
            async with asyncio.timeout(deadline_s):
                await point(self._transport, _DRAINING)
                await self.station.drained()
                await point(self._transport, _EMPTIED)
                await self.outer.final_round()
                await point(self._transport, _DRAINED)
        except TimeoutError:
            self._event("drain-cut", {"after_s": deadline_s})

    def heartbeat(self) -> Beat:
        """What neighbours hear of this replica, once it has recovered."""
        return self._report.heartbeat()

    def status(self) -> dict[str, object]:
        """Figures for `shoal status`, likewise."""
        return self._report.status()

    def ledger(self) -> dict[str, list[tuple[int, int]]]:
        """Applied micro-batches, `driver/incarnation` -> intervals."""
        return self.decisions.applied()

    def _learning_rate(self) -> float:
        return learning_rate(self.outer.spec, self.outer.tokens)

    def _first_stage_head(self) -> bytes:
        """Of the first stage's longest log that is heard of: entries of the other stages name it."""
        if self.stage == 0:
            return self.outer.head
        beats = (member.progress(0) for member in self._members.view().group(0))
        known = [beat for beat in beats if beat is not None]
        return max(known, key=lambda beat: (beat.log_tokens, beat.head)).head if known else bytes(32)

    def _outer_event(self, kind: str, data: dict[str, object]) -> None:
        if kind == "round":  # the group waits for beats at the new height before it opens another
            self._members.changed_now()
        self._event(kind, data)

    def _group(self) -> Sequence[GroupMember]:
        view = self._members.view()
        return group_members(view, self._incarnation, self._progress.beat(), self.outer.last_seats)

    def _is_scorer(self) -> bool:
        """Of all drivers the one of lowest id."""
        drivers = [member.peer for member in self._members.view().online(0)]
        return not self._amended.paused and self._me == min(drivers, default=self._me)
