"""The daemon's hold on its Trainer: makes what a trainer needs on a real machine, and closes it again.

A place on the peer's bench, and the data stream where this peer is a driver.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from shoal.dht.beats import Beat
from shoal.node.bench import Bench
from shoal.node.events import Events
from shoal.node.hardware import Device, within_memory
from shoal.node.paths import cache_root
from shoal.node.presence import Presence
from shoal.node.tokenizers import with_tokenizer
from shoal.protocol.identity import PeerId
from shoal.training.decisions import DecisionLog
from shoal.training.feed import CorpusFeed, Feed
from shoal.training.methods import of_stage
from shoal.training.serving.host import Host
from shoal.training.spec import RunSpec
from shoal.training.streams import own_stream
from shoal.training.trainer import Trainer

if TYPE_CHECKING:
    from shoal.training.devices.gang import Gang


class Trainee:
    """One Trainer and what it stands on. Use as `async with`."""

    def __init__(
        self,
        presence: Presence,
        spec: RunSpec,
        stage: int,
        device: Device,
        bench: Bench,
        incarnation: int,
        folder: Path,
        store: Path,
        events: Events,
        *,
        fixed: bool,
        spare_bytes: int = 0,
        session_bytes: int,
        stages_most: int,
        guards: Callable[[], bool],
        decisions: DecisionLog | None = None,
        gang: Gang | None = None,
    ) -> None:
        """`folder` takes what is written of the run, `store` has the imported checkpoints.

        `spare_bytes`: for copies of other stages; `session_bytes`: for inference; `guards`: whether this is
        the one of the peer's replicas that keeps the copies.
        """
        self.stage = stage
        self.trouble = ""  # why this peer does not get to work, and what to do
        self._presence = presence
        self._spec = spec
        self._device = device
        self._folder = folder
        self._store = store
        self._events = events
        self._bench = bench
        self._incarnation = incarnation
        self._fixed = fixed
        self._guards = guards
        self._stages_most = stages_most
        self._spare_bytes = spare_bytes
        self._session_bytes = session_bytes
        self._decisions = decisions
        self._gang = gang
        self._trainer: Trainer | Host | None = None
        self._done: dict[str, object] = {}  # of one that has ended
        self._applied: dict[str, list[tuple[int, int]]] = {}  # likewise

    async def __aenter__(self) -> Self:
        self._lane = self._bench.take()
        return self

    async def __aexit__(self, *_: object) -> None:
        transport = self._presence.transport
        transport.withdraw(of_stage(transport.methods, self.stage))
        self._done, self._applied = self.status(), self.ledger()
        self._trainer = None  # with its weights
        await self._bench.release()

    async def recover(self) -> None:
        """Bring the stage to its group's state; afterwards it serves. Raises HardwareTooSmall and others."""
        with within_memory(f"stage {self.stage}"):
            trainer = await self._made() if self._spec.trains else self._host()
            await trainer.recover()
        self._trainer = trainer

    async def _made(self) -> Trainer:
        presence = self._presence
        return Trainer(
            self._spec,
            self.stage,
            transport=presence.transport,
            members=presence.members,
            lane=self._lane,
            offload=self._bench.offload,
            disk=self._bench.disk,
            feed=await self._feed() if self.stage == 0 else None,
            me=presence.transport.me,
            incarnation=self._incarnation,
            event=self._tell,
            rng=random.Random(presence.rng.getrandbits(64)),
            device=self._device.torch_name,
            host_optimizer=self._device.host_optimizer,
            gang=self._gang,
            data_dir=self._folder,
            fixed=self._fixed,
            imported=(self._store,),
            spare_bytes=self._spare_bytes,
            stages_most=self._stages_most,
            guards=self._guards,
            session_bytes=self._session_bytes,
            decisions=self._decisions,
        )

    def _host(self) -> Host:
        presence = self._presence
        return Host(
            self._spec,
            self.stage,
            transport=presence.transport,
            members=presence.members,
            lane=self._lane,
            offload=self._bench.offload,
            event=self._tell,
            rng=random.Random(presence.rng.getrandbits(64)),
            folder=self._folder,
            device=self._device.torch_name,
            imported=(self._store,),
            session_bytes=self._session_bytes,
            fixed=self._fixed,
        )

    async def run(self) -> None:
        """Train until cancelled; after `recover`."""
        if self._trainer is None:
            raise RuntimeError("run comes after recover")
        await self._trainer.run()

    async def permission(self, hurry: Callable[[], bool]) -> None:
        """Returns when the group lets this peer go; `hurry`: whether the next round shall be at once."""
        if self._trainer is None:
            raise RuntimeError("permission comes after recover")
        await self._trainer.permission(hurry)

    async def drain(self, deadline_s: float) -> None:
        if self._trainer is not None:
            await self._trainer.drain(deadline_s)

    async def stop_guarding(self, stage: int) -> None:
        """This peer is about to hold that stage, too."""
        if isinstance(self._trainer, Trainer):
            await self._trainer.stop_guarding(stage)

    @property
    def recovered(self) -> bool:
        """Whether it has something to tell."""
        return self._trainer is not None

    @property
    def layers(self) -> tuple[int, int] | None:
        if self._trainer is None:
            return None
        start, stop = self._trainer.layers.start, self._trainer.layers.stop
        return start, stop - 1

    def beat(self) -> Beat:
        return self._trainer.heartbeat() if self._trainer is not None else Beat()

    def status(self) -> dict[str, object]:
        return self._trainer.status() if self._trainer is not None else self._done

    def ledger(self) -> dict[str, list[tuple[int, int]]]:
        return self._trainer.ledger() if self._trainer is not None else self._applied

    def heads(self) -> dict[str, object]:
        """Height and head of the stage's log, for events."""
        progress = self.beat().stages
        return {"height": progress[0].height, "head": progress[0].head.hex()} if progress else {}

    def _tell(self, kind: str, fields: Mapping[str, object]) -> None:
        """Pass the trainer's events on; a round is told with the state it led to."""
        trainer = self._trainer
        if kind in ("stage-lost", "stage-found", "stage-rebuilt"):
            self.trouble = str(fields.get("text", ""))
        if kind == "round" and trainer is not None:
            progress = trainer.heartbeat().stages[0]
            status = trainer.status()
            fields = {
                **fields,
                "stage": progress.stage,
                "height": progress.height,
                "head": progress.head.hex(),
                "state_root": progress.state_root.hex(),
                "inner_step": progress.inner_steps,
                "log_tokens": progress.log_tokens,
                "tokens_per_s": status["tokens_per_s"],
                "loss": status.get("loss"),
            }
        self._events(kind, fields)

    async def prefetch(self, stage: int, donors: Sequence[PeerId]) -> None:
        """Another stage's state onto the disk, while this one goes on. Raises NotHere and others."""
        if self._trainer is not None:
            await self._trainer.prefetch(stage, donors)

    async def _feed(self) -> Feed:
        """The corpus; the streams to read come from the log, or this driver begins its own."""
        folder = cache_root() / "corpora"
        self._events("corpus", {"text": "opening the corpus (built on the first use)"})
        spec = await with_tokenizer(self._spec, self._presence.transport, self._presence.others())
        return await CorpusFeed.open(
            spec, folder, own_stream(self._presence.transport.me, {}), self._bench.offload
        )
