"""What a volunteer may say about their machine; the command line fills it in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from shoal.node.dashboard.address import DashboardOptions
from shoal.node.presence import Listening
from shoal.node.sinks.telling import Sink
from shoal.training.work import SHARE

ALL_THREADS: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOptions:
    """All of `shoal up` and `shoal join` that is not about the run."""

    devices: tuple[str, ...] = ("auto",)  # several: the stage is sharded over them
    host_optimizer: bool = False  # optimizer and float32 weights in the machine's memory, not a GPU's
    memory_bytes: int | None = None
    threads: int | None = ALL_THREADS
    upload_bytes_per_s: float | None = None  # most to send; None: no limit
    name: str = ""
    stage: int | None = None  # None: where the swarm needs it most
    stages_most: int = 1  # that it holds at once
    train: bool = True
    inference_share: float = SHARE  # of the lane's time while training would use all of it
    pace_s: float = 0.0  # a micro-batch takes at least so long, for speed tests: `training.work.paced`
    decisions: Path | None = None  # where to write what the policies decide: `training.decisions`
    metrics: tuple[str, int] | None = None  # where /metrics is served
    listening: Listening = field(default_factory=Listening)
    dashboard: DashboardOptions | None = None  # the owner's page
    sinks: tuple[Sink, ...] = ()  # where the owner's figures go besides
