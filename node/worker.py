"""A peer's part in training: finds out what its machine is, takes a stage, and serves there or elsewhere.

The daemon runs one. The deciding is done elsewhere: which stage (`placing`), when to move
(`training.tenure`), what to compute (`training.trainer`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.dht.beats import Beat, together
from shoal.node.bench import Bench
from shoal.node.events import Events
from shoal.node.hardware import (
    Device,
    check_memory,
    freeze,
    session_bytes,
    spare_bytes,
    warm_up,
    warm_up_codecs,
)
from shoal.node.options import PeerOptions
from shoal.node.placing import look_again, meet, take_stage
from shoal.node.presence import Presence
from shoal.node.reachability import Reach, find_reach
from shoal.node.trainee import Trainee
from shoal.node.view.figures import counts_of
from shoal.node.view.rows import stage_replicas
from shoal.node.view.verdict import verdict
from shoal.protocol.errors import UsageError
from shoal.protocol.identity import PeerId
from shoal.training.decisions import DecisionLog
from shoal.training.partition import spec_costs
from shoal.training.plan import make_plan
from shoal.training.spec import RunSpec
from shoal.training.tenure import DRAIN_S, Tenure, announced

if TYPE_CHECKING:
    from shoal.training.devices.gang import Gang


class Worker:
    """`run` until cancelled; `drain` before that to leave in order."""

    def __init__(
        self,
        presence: Presence,
        options: PeerOptions,
        folder: Path,
        store: Path,
        events: Events,
        device: Awaitable[Device] | None,
    ) -> None:
        """`folder` takes what is written of the run, `store` has the imported checkpoints. `device`: what is
        trained on, as `preparing` finds out; None for a peer that watches."""
        self.device: Device | None = None
        self.trainees: dict[int, Trainee] = {}  # by stage, in the order in which it came to them
        self._last: Trainee | None = None
        self._left: Counter[str] = Counter()  # what replicas that have ended had counted
        self.reach = Reach("nobody else is here yet to try it", None)
        self._presence = presence
        self._options = options
        self._folder = folder
        self._store = store
        self._events = events
        self._found_device = device
        self._tenure: Tenure | None = None
        self._decisions = DecisionLog(options.decisions, events) if options.decisions else None

    async def run(self) -> None:
        """Learn the run, take a stage, train."""
        if self._found_device is None:
            await self._watch()
            return
        async with asyncio.TaskGroup() as tasks:
            preparing = tasks.create_task(self._take_device(self._found_device), name="take the device")
            choosing = tasks.create_task(self._find_place(), name="find a place")
        device, (spec, stage) = preparing.result(), choosing.result()
        if others := self._others():
            self.reach = await find_reach(self._presence.transport, others, self._presence.rng)
        if self._options.stage is None and others:
            presence = self._presence
            stage = look_again(presence.members, presence.announce, spec_costs(spec), stage)
        if not device.others:
            await self._serve(spec, stage, device, None)
            return
        await asyncio.to_thread(importlib.import_module, "shoal.node.devices")  # brings FSDP: two seconds
        from shoal.node.devices import several

        async with several(spec, device.names) as gang:
            await self._serve(spec, stage, device, gang)

    async def _serve(self, spec: RunSpec, stage: int, device: Device, gang: Gang | None) -> None:
        self._tenure = Tenure(
            spec,
            view=self._presence.members.view,
            begin=lambda at: self._begin(spec, at, device, gang),
            announce=lambda held: self._presence.announce(*announced(held)),
            prefetch=self._prefetch,
            fits=lambda stages: self._fits(spec, stages, device),
            event=self._tell_tenure,
            rng=self._presence.rng,
            moves=self._options.stage is None,
            most=self._options.stages_most,
            decisions=self._decisions,
        )
        with self._decisions or contextlib.nullcontext():
            async with Bench(self._options.pace_s, self._options.inference_share) as self._bench:
                await self._tenure.run(stage)

    @property
    def trainee(self) -> Trainee | None:
        """Of the first of its stages, or the last that it had."""
        return next(iter(self.trainees.values()), self._last)

    def done(self) -> Counter[str]:
        """What this process has counted, at the stages that it has left too."""
        counted = Counter(self._left)
        for trainee in self.trainees.values():
            counted.update(counts_of(trainee.status()))
        return counted

    @staticmethod
    def _fits(spec: RunSpec, stages: Sequence[int], device: Device) -> bool:
        planned = make_plan(spec).stages
        return sum(device.needed_bytes(planned[stage]) for stage in stages) <= device.memory_bytes

    @contextlib.asynccontextmanager
    async def _begin(
        self, spec: RunSpec, stage: int, device: Device, gang: Gang | None
    ) -> AsyncIterator[Trainee]:
        """A replica of a stage; a later one is another incarnation, with its own steps and micro-batches."""
        incarnation = self._presence.incarnation
        if self._last is not None:
            incarnation = time.time_ns()
            if not self.trainees:
                self._presence.incarnation = incarnation
        stages = make_plan(spec).stages
        planned = stages[stage]
        check_memory(device, planned)
        self._tell_plan(spec, stage, device)
        if self._last is None:
            await asyncio.to_thread(warm_up_codecs, stages)
        else:
            await asyncio.to_thread(gc.collect)  # a replica that was left is a ring of gigabytes
        options, left = self._options, self._without_room(spec, stage, device)
        async with Trainee(
            self._presence,
            spec,
            stage,
            device,
            self._bench,
            incarnation,
            self._folder,
            self._store,
            self._events,
            fixed=options.stage is not None,
            spare_bytes=spare_bytes(left, planned),
            session_bytes=session_bytes(left, planned, trains=spec.trains) // options.stages_most,
            stages_most=options.stages_most,
            guards=lambda: next(iter(self.trainees), stage) == stage,
            decisions=self._decisions,
            gang=gang,
        ) as trainee:
            self._last = self.trainees[stage] = trainee
            try:
                yield trainee
            finally:
                self._left.update(counts_of(trainee.status()))
                del self.trainees[stage]
        if self.trainees:  # they go on, maybe for days, in the memory that this one was given back for
            await asyncio.to_thread(gc.collect)

    def _without_room(self, spec: RunSpec, stage: int, device: Device) -> Device:
        """What is left of the device beside the other stages that this peer may come to hold."""
        stages = make_plan(spec).stages
        others = sorted(device.needed_bytes(other) for other in stages if other.stage != stage)
        room = sum(others[::-1][: self._options.stages_most - 1])
        least = device.needed_bytes(stages[stage])
        return replace(device, memory_bytes=max(least, device.memory_bytes - room))

    async def _prefetch(self, stage: int, donors: Sequence[PeerId]) -> None:
        if self.trainee is not None:
            await self.trainee.prefetch(stage, donors)

    async def _watch(self) -> None:
        """Take part without a stage, until cancelled."""
        spec = await self._learn_spec()
        self._presence.announce("observing", ())
        await asyncio.to_thread(warm_up)
        await asyncio.to_thread(freeze)
        self._events("observing", {"text": f"watching run {spec.run.name}; this peer does not train"})
        await asyncio.Event().wait()

    async def _take_device(self, found: Awaitable[Device]) -> Device:
        device = await found
        self.device, self._presence.device = device, device.title
        await asyncio.to_thread(freeze)
        return device

    async def _find_place(self) -> tuple[RunSpec, int]:
        presence, wanted = self._presence, self._options.stage
        async with asyncio.TaskGroup() as tasks:
            learning = tasks.create_task(self._learn_spec(), name="learn the run")
            if wanted is None and presence.token.bootstrap:  # else there is nobody to meet
                tasks.create_task(meet(presence.members), name="look around")
        spec = learning.result()
        if wanted is None:
            return spec, await take_stage(presence.members, presence.announce, spec_costs(spec))
        if wanted >= spec.stages.count:
            raise UsageError(
                f"the run has the stages 0 to {spec.stages.count - 1}, so --stage {wanted} is none"
            )
        presence.announce("joining", (wanted,))
        return spec, wanted

    async def _learn_spec(self) -> RunSpec:
        return (self._presence.spec or await self._presence.learn_spec(self._folder)).spec

    async def drain(self) -> None:
        """Finish what is held and contribute it."""
        if self._tenure is not None:
            await self._tenure.drain(DRAIN_S)

    async def test_reach(self) -> None:
        """The first peer of a swarm has nobody to ask at its start; ask when somebody is here."""
        while self.reach.reachable is None:
            await self._presence.members.changed()
            if self._presence.state == "online" and self._others():
                self.reach = await find_reach(self._presence.transport, self._others(), self._presence.rng)

    def beat(self) -> Beat:
        """What heartbeats say."""
        beats = [trainee.beat() for trainee in self.trainees.values() if trainee.recovered]
        beat = together(beats)
        return self._tenure.complete(beat) if self._tenure is not None else beat

    def _others(self) -> list[PeerId]:
        view = self._presence.members.view()
        return [member.peer for member in view.here() if member.peer != view.me]

    def _tell_plan(self, spec: RunSpec, stage: int, device: Device) -> None:
        """One screen before work."""
        planned, presence = make_plan(spec).stages[stage], self._presence
        view = presence.members.view()
        others = sum(member.peer != view.me for member in view.group(stage))
        layers = planned.layers
        text = "\n".join(
            (
                f"run {spec.run.name} ({presence.token.run_id.hex()[:8]}), you are {presence.name}",
                f"  device    {device.title}",
                f"  stage     {stage} of {spec.stages.count}: layers {layers.start}-{layers.stop - 1} of "
                f"{spec.model.layers}, {planned.parameters:,} parameters; "
                f"{others or 'no'} other {'peer shares' if others == 1 else 'peers share'} it",
                f"  memory    {device.needed_bytes(planned) >> 20:,} of {device.memory_bytes >> 20:,} MiB",
                f"  address   {', '.join(presence.addresses)}: {self.reach.text}",
                f"  status    {verdict(stage_replicas(view, spec.stages.count), trains=spec.trains).text}",
            )
        )
        fields = {
            "peer": view.me,
            "stage": stage,
            "stages": spec.stages.count,
            "layers": [layers.start, layers.stop],
            "device": device.title,
            "memory_bytes": device.needed_bytes(planned),
            "reachable": self.reach.reachable,
        }
        self._events("plan", {**fields, "text": text})

    def _tell_tenure(self, kind: str, fields: dict[str, object]) -> None:
        trainee = self.trainees.get(int(str(fields["stage"]))) if kind == "online" else None
        self._events(kind, {**fields, **(trainee.heads() if trainee is not None else {})})
