"""All that a replica serves of its stage's anchor: sessions and the tuning of adapters."""

from __future__ import annotations

from collections.abc import Callable

from shoal.dht.directory import SignedRecord
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.training.lane import Lane
from shoal.training.model.layout import StageLayout
from shoal.training.serving.form import Form
from shoal.training.serving.server import SessionServer
from shoal.training.serving.tuning import TuningServer
from shoal.training.serving.versions import Versions
from shoal.training.spec import RunSpec


class ServedStage:
    """The trainer makes one. `serve` before the stage's log goes on, `sessions.run` until cancelled."""

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        layout: StageLayout,
        *,
        transport: Transport,
        lane: Lane,
        device: str,
        session_bytes: int,
        introduced: Callable[[PeerId, SignedRecord], None],
    ) -> None:
        self.versions = Versions(Form.of(spec, layout))
        self.sessions = SessionServer(
            spec,
            stage,
            layout,
            transport=transport,
            lane=lane,
            versions=self.versions,
            device=device,
            budget_bytes=session_bytes,
            introduced=introduced,
        )
        self._tuning = TuningServer(
            spec, stage, layout, transport=transport, lane=lane, versions=self.versions, device=device
        )

    def serve(self) -> None:
        """Register with the transport."""
        self.sessions.serve()
        self._tuning.serve()

    def claimed_step_s(self) -> float:
        """What heartbeats say that a token takes here; 0: not known."""
        return self.sessions.engine.claimed_step_s()
