"""The daemon's hold on its Trainer: makes what a trainer needs on a real machine, and closes it again.

A compute lane for the device, a small pool for work that must not run on the loop, and the data
stream where this peer is a driver.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

from shoal.dht.beats import Beat
from shoal.node.events import Events
from shoal.node.hardware import Device
from shoal.node.paths import cache_root
from shoal.node.presence import Presence
from shoal.node.tokenizers import with_tokenizer
from shoal.protocol.identity import PeerId
from shoal.training.decisions import DecisionLog
from shoal.training.feed import CorpusFeed, Feed
from shoal.training.lane import ThreadLane, paced
from shoal.training.serving.host import Host
from shoal.training.spec import RunSpec
from shoal.training.streams import own_stream
from shoal.training.trainer import Trainer

_OFFLOAD_THREADS = 2  # codecs and hashing beside the lane; more would only contend with it
_SERVED = 16  # of a paced micro-batch: a batch of inference takes a sixteenth of it
T = TypeVar("T")


class Trainee:
    """One Trainer and what it stands on. Use as `async with`."""

    def __init__(
        self,
        presence: Presence,
        spec: RunSpec,
        stage: int,
        device: Device,
        folder: Path,
        store: Path,
        events: Events,
        *,
        fixed: bool,
        pace_s: float = 0.0,
        inference_share: float,
        spare_bytes: int = 0,
        session_bytes: int,
        decisions: DecisionLog | None = None,
    ) -> None:
        """`folder` takes what is written of the run, `store` has the imported checkpoints.

        A micro-batch takes at least `pace_s` of the lane, inference its share. `spare_bytes`: for copies of
        other stages; `session_bytes`: for inference.
        """
        self.stage = stage
        self.trouble = ""  # why this peer does not get to work, and what to do
        self._presence = presence
        self._spec = spec
        self._device = device
        self._folder = folder
        self._store = store
        self._events = events
        self._fixed = fixed
        self._pace_s = pace_s
        self._inference_share = inference_share
        self._spare_bytes = spare_bytes
        self._session_bytes = session_bytes
        self._decisions = decisions
        self._pool = ThreadPoolExecutor(_OFFLOAD_THREADS, thread_name_prefix="offload")
        self._trainer: Trainer | Host | None = None

    async def __aenter__(self) -> Self:
        self._lane = ThreadLane(
            least_s=paced(self._pace_s, self._pace_s / _SERVED), share=self._inference_share
        )
        self._served_before = self._presence.transport.methods
        return self

    async def __aexit__(self, *_: object) -> None:
        transport = self._presence.transport
        transport.withdraw(transport.methods - self._served_before)
        await self._lane.close()
        await asyncio.to_thread(self._pool.shutdown, True, cancel_futures=True)

    async def recover(self) -> None:
        """Bring the stage to its group's state; afterwards it serves."""
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
            offload=self._offload,
            feed=await self._feed() if self.stage == 0 else None,
            me=presence.transport.me,
            incarnation=presence.incarnation,
            event=self._tell,
            rng=random.Random(presence.rng.getrandbits(64)),
            device=self._device.torch_name,
            host_optimizer=self._device.host_optimizer,
            data_dir=self._folder,
            fixed=self._fixed,
            imported=(self._store,),
            spare_bytes=self._spare_bytes,
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
            offload=self._offload,
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

    async def permission(self) -> None:
        """Returns when the group lets this peer go."""
        if self._trainer is None:
            raise RuntimeError("permission comes after recover")
        await self._trainer.permission()

    async def drain(self, deadline_s: float) -> None:
        if self._trainer is not None:
            await self._trainer.drain(deadline_s)

    @property
    def layers(self) -> tuple[int, int] | None:
        if self._trainer is None:
            return None
        start, stop = self._trainer.layers.start, self._trainer.layers.stop
        return start, stop - 1

    def beat(self) -> Beat:
        return self._trainer.heartbeat() if self._trainer is not None else Beat()

    def status(self) -> dict[str, object]:
        return self._trainer.status() if self._trainer is not None else {}

    def ledger(self) -> dict[str, list[tuple[int, int]]]:
        return self._trainer.ledger() if self._trainer is not None else {}

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
            progress = trainer.beat()[0]
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

    async def _offload(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def _feed(self) -> Feed:
        """The corpus; the streams to read come from the log, or this driver begins its own."""
        folder = cache_root() / "corpora"
        self._events("corpus", {"text": "opening the corpus (built on the first use)"})
        spec = await with_tokenizer(self._spec, self._presence.transport, self._presence.others())
        return await CorpusFeed.open(spec, folder, own_stream(self._presence.transport.me, {}), self._offload)
