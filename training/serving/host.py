"""Host: one replica of a stage in a swarm that only serves (`inner.mode = "off"`).

It stands where `Trainer` stands in a run that trains: the daemon's `Trainee` makes one. It holds the weights
that the run starts from, in the form they are served in, and nothing else; every replica has the same
ones, so a mover needs nobody's agreement but that its stage is not left empty.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from shoal.dht.beats import Beat, StageBeat
from shoal.dht.members import Members
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.training.checkpoint.manifest import START_FOLDER
from shoal.training.checkpoint.read import Checkpoint
from shoal.training.checkpoint.reshape import weights_of
from shoal.training.checkpoint.start import Read, start_state
from shoal.training.lane import Lane
from shoal.training.model.layout import StageLayout, first_values, stage_layout
from shoal.training.model.stage import Held
from shoal.training.outer.context import Event, Offload
from shoal.training.partition import stage_ranges
from shoal.training.serving.form import Form, load_held
from shoal.training.serving.server import SessionServer
from shoal.training.serving.tuning import TuningServer
from shoal.training.serving.versions import Versions
from shoal.training.spec import RunSpec

T = TypeVar("T")


class Host:
    """See the module. `recover` loads and serves; `run` computes until cancelled."""

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        *,
        transport: Transport,
        members: Members,
        lane: Lane,
        offload: Offload,
        event: Event,
        rng: random.Random,
        folder: Path,
        device: str = "cpu",
        imported: Sequence[Path] = (),
        session_bytes: int,
        fixed: bool = False,
    ) -> None:
        """`folder` takes what is fetched from peers, `imported` are folders of checkpoints."""
        self.stage = stage
        self._spec = spec
        self._transport = transport
        self._members = members
        self._lane = lane
        self._offload = offload
        self._event = event
        self._rng = rng
        self._folder = folder
        self._device = device
        self._imported = imported
        self._fixed = fixed
        self._name = bytes.fromhex(spec.checkpoint.start) or spec.run_id()  # of the only version
        self._layout = stage_layout(spec, stage_ranges(spec)[stage])
        self.sessions = SessionServer(
            spec,
            stage,
            self._layout,
            transport=transport,
            lane=lane,
            versions=Versions(Form.of(spec, self._layout)),
            device=device,
            budget_bytes=session_bytes,
            introduced=members.introduced,
        )

        self._tuning = TuningServer(
            spec,
            stage,
            self._layout,
            transport=transport,
            lane=lane,
            versions=self.sessions.versions,
            device=device,
        )

    @property
    def layers(self) -> range:
        """Those it holds."""
        return self._layout.layers

    async def recover(self) -> None:
        """Load the stage from the disk or from peers. Raises StageEmpty, StorageError, SpecError."""
        held = await self._load()
        self.sessions.versions.publish(self._name, held)
        await self.sessions.engine.warm(self.sessions.versions.get(b""))
        self.sessions.serve()
        self._tuning.serve()

    async def _load(self) -> Held:
        spec, layout = self._spec, self._layout
        if spec.checkpoint.start:
            return await self._start(layout, self._held)
        drawn = ((slot, first_values(spec, slot)) for slot in layout.slots)
        found: Held = await self._offload(load_held, spec, layout, drawn, self._device)
        return found

    def _held(self, checkpoint: Checkpoint, spec: RunSpec, layout: StageLayout) -> Held:
        return load_held(spec, layout, weights_of(checkpoint, spec, layout), self._device)

    async def _start(self, layout: StageLayout, read: Read[T]) -> T:
        """What the run starts from, of a stage: from the disk or from peers."""
        return await start_state(
            self._spec,
            layout,
            read,
            folders=self._imported,
            fetched=self._folder / START_FOLDER,
            transport=self._transport,
            peers=self._others,
            offload=self._offload,
            event=self._event,
            rng=random.Random(self._rng.getrandbits(64)),
        )

    def _others(self) -> list[PeerId]:
        return [member.peer for member in self._members.view().here() if member.peer != self._transport.me]

    async def run(self) -> None:
        """Answer until cancelled; sessions that are open then go on at another replica."""
        await self.sessions.run()

    async def prefetch(self, stage: int, donors: Sequence[PeerId]) -> None:
        """Another stage's files to the own disk, while this one is served. Raises what `recover` raises."""
        if self._spec.checkpoint.start:
            await self._start(stage_layout(self._spec, stage_ranges(self._spec)[stage]), _checked)

    async def permission(self, hurry: Callable[[], bool]) -> None:
        """Returns when another replica serves the stage. Two that go at once come back by the plan."""
        me = self._members.view().me
        while all(member.peer == me for member in self._members.view().online(self.stage)):
            await self._members.changed()

    async def drain(self, deadline_s: float) -> None:
        """Nothing is held that others lack: clients go on elsewhere, with what they have."""

    def heartbeat(self) -> Beat:
        """What neighbours hear: one version, which is the head, and the lane's load."""
        load = self._lane.load()
        stage = StageBeat(
            stage=self.stage,
            head=self._name,
            service_s=load.service_s,
            fixed=self._fixed,
            step_s=self.sessions.engine.claimed_step_s(),
        )
        return Beat(backlog_s=load.backlog_s, finished_work=load.finished, stages=(stage,))

    def ledger(self) -> dict[str, list[tuple[int, int]]]:
        """No micro-batch is applied here."""
        return {}

    def status(self) -> dict[str, object]:
        """Figures for `shoal status`, JSON-able, keys as in a trainer's."""
        load = self._lane.load()
        return {
            "stage": self.stage,
            "layers": [self._layout.layers.start, self._layout.layers.stop],
            "parameters": self._layout.size,
            "height": 0,
            "head": self._name.hex(),
            "lane_queued": load.queued,
            "lane_backlog_s": load.backlog_s,
            "lane_busy_s": load.busy_s,
            "lane_served_s": load.served_s,
            "lane_service_s": load.service_s,
            "lane_finished": load.finished,
            "sessions": self.sessions.status(),
        }


def _checked(checkpoint: Checkpoint, spec: RunSpec, layout: StageLayout) -> None:
    """Every byte read and compared with its hash; the memory is the served stage's."""
    for _ in weights_of(checkpoint, spec, layout):
        pass
