"""A peer's part in training: finds out what its machine is, takes a stage, and serves there or elsewhere.

The daemon runs one. The deciding is done elsewhere: which stage (`placing`), when to move
(`training.tenure`), what to compute (`training.trainer`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from shoal.dht.beats import Beat
from shoal.node.events import Events
from shoal.node.hardware import (
    Device,
    check_memory,
    choose_device,
    session_bytes,
    spare_bytes,
    warm_up,
    warm_up_codecs,
)
from shoal.node.options import PeerOptions
from shoal.node.placing import take_stage
from shoal.node.presence import Presence
from shoal.node.reachability import Reach, find_reach
from shoal.node.trainee import Trainee
from shoal.node.view.rows import stage_replicas
from shoal.node.view.verdict import verdict
from shoal.protocol.errors import UsageError
from shoal.protocol.identity import PeerId
from shoal.training.decisions import DecisionLog
from shoal.training.partition import spec_costs
from shoal.training.plan import make_plan
from shoal.training.spec import RunSpec
from shoal.training.tenure import DRAIN_S, Tenure


class Worker:
    """`run` until cancelled; `drain` before that to leave in order."""

    def __init__(
        self, presence: Presence, options: PeerOptions, folder: Path, store: Path, events: Events
    ) -> None:
        """`folder` takes what is written of the run, `store` has the imported checkpoints."""
        self.device: Device | None = None
        self.trainee: Trainee | None = None
        self.reach = Reach("nobody else is here yet to try it", None)
        self._presence = presence
        self._options = options
        self._folder = folder
        self._store = store
        self._events = events
        self._tenure: Tenure | None = None
        self._decisions = DecisionLog(options.decisions, events) if options.decisions else None

    async def run(self) -> None:
        """Learn the run, take a stage, train."""
        if not self._options.train:
            await self._watch()
        async with asyncio.TaskGroup() as tasks:
            preparing = tasks.create_task(self._prepare_device(), name="prepare the device")
            choosing = tasks.create_task(self._find_place(), name="find a place")
        device, (spec, stage) = preparing.result(), choosing.result()
        if others := self._others():
            self.reach = await find_reach(self._presence.transport, others, self._presence.rng)
        self._tenure = Tenure(
            spec,
            view=self._presence.members.view,
            begin=lambda at: self._begin(spec, at, device),
            announce=self._presence.announce,
            prefetch=self._prefetch,
            fits=lambda at: device.needed_bytes(make_plan(spec).stages[at]) <= device.memory_bytes,
            event=self._tell_tenure,
            rng=self._presence.rng,
            moves=self._options.stage is None,
            decisions=self._decisions,
        )
        with self._decisions or contextlib.nullcontext():
            await self._tenure.run(stage)

    @contextlib.asynccontextmanager
    async def _begin(self, spec: RunSpec, stage: int, device: Device) -> AsyncIterator[Trainee]:
        """A replica of a stage; a later one is another incarnation, with its own steps and micro-batches."""
        if self.trainee is not None:
            self._presence.incarnation = time.time_ns()
        planned = make_plan(spec).stages[stage]
        check_memory(device, planned)
        self._tell_plan(spec, stage, device)
        await asyncio.to_thread(warm_up_codecs, planned)
        options = self._options
        async with Trainee(
            self._presence,
            spec,
            stage,
            device,
            self._folder,
            self._store,
            self._events,
            fixed=options.stage is not None,
            pace_s=options.pace_s,
            inference_share=options.inference_share,
            spare_bytes=spare_bytes(device, planned),
            session_bytes=session_bytes(device, planned, trains=spec.trains),
            decisions=self._decisions,
        ) as trainee:
            self.trainee = trainee
            yield trainee

    async def _prefetch(self, stage: int, donors: Sequence[PeerId]) -> None:
        if self.trainee is not None:
            await self.trainee.prefetch(stage, donors)

    async def _watch(self) -> None:
        """Take part without a stage, until cancelled."""
        spec = (self._presence.spec or await self._presence.learn_spec(self._folder)).spec
        self._presence.announce("observing", ())
        await asyncio.to_thread(warm_up)
        self._events("observing", {"text": f"watching run {spec.run.name}; this peer does not train"})
        await asyncio.Event().wait()

    async def _prepare_device(self) -> Device:
        options = self._options
        device = await asyncio.to_thread(
            choose_device, options.device, options.memory_bytes, options.threads, options.host_optimizer
        )
        self.device, self._presence.device = device, device.title
        await asyncio.to_thread(warm_up)
        return device

    async def _find_place(self) -> tuple[RunSpec, int]:
        spec = (self._presence.spec or await self._presence.learn_spec(self._folder)).spec
        wanted = self._options.stage
        if wanted is None:
            presence = self._presence
            first = not presence.token.bootstrap
            return spec, await take_stage(presence.members, presence.announce, spec_costs(spec), first=first)
        if wanted >= spec.stages.count:
            raise UsageError(
                f"the run has the stages 0 to {spec.stages.count - 1}, so --stage {wanted} is none"
            )
        self._presence.announce("joining", (wanted,))
        return spec, wanted

    async def drain(self) -> None:
        """Finish what is held and contribute it."""
        if self._tenure is not None and self._tenure.term is not None:
            await self._tenure.term.drain(DRAIN_S)

    async def test_reach(self) -> None:
        """The first peer of a swarm has nobody to ask at its start; ask when somebody is here."""
        while self.reach.reachable is None:
            await self._presence.members.changed()
            if self._presence.state == "online" and self._others():
                self.reach = await find_reach(self._presence.transport, self._others(), self._presence.rng)

    def beat(self) -> Beat:
        """What heartbeats say."""
        return self.trainee.beat() if self.trainee is not None else Beat()

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
        heads = self.trainee.heads() if kind == "online" and self.trainee is not None else {}
        self._events(kind, {**fields, **heads})
