"""Station: a replica's place in the pipeline, put together: driver or hop, the way on, and what both count.

`Trainer` makes one once its weights are those of the group. A replica of the first stage drives, every other
one is a hop; all but the last stage have somebody downstream.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable

import torch

from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.training.decisions import DecisionLog
from shoal.training.lane import Lane
from shoal.training.pipeline.compute import StageCompute
from shoal.training.pipeline.downstream import Downstream
from shoal.training.pipeline.driver import Driver
from shoal.training.pipeline.hop import Hop
from shoal.training.pipeline.ledger import Ledger
from shoal.training.pipeline.replicas import Replicas
from shoal.training.pipeline.successors import Event
from shoal.training.spec import RunSpec
from shoal.training.work import weights_in_stock

_RATE_WINDOW_S = 20.0
_REROUTES_TOLD = 100


class Station:
    """`serve` before the transport takes calls, `run` until cancelled, `drained` before leaving."""

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        *,
        me: PeerId,
        incarnation: int,
        transport: Transport,
        replicas: Replicas,
        compute: StageCompute,
        lane: Lane,
        ledger: Ledger,
        stepped: Callable[[], None],
        added: Callable[[torch.Tensor, bool], None],
        event: Event,
        rng: random.Random,
        decisions: DecisionLog | None,
        stages: int = 1,
    ) -> None:
        """`stepped` is called after an inner step, `added` as `Driver` says; `stages`: that this peer may
        hold, of whose memory this one has its part."""
        lane.weights_waiting = weights_in_stock(spec.inner.in_flight)
        self.ledger = ledger
        self.driver: Driver | None = None
        self.hop: Hop | None = None
        self._event = event
        self._marks: deque[tuple[float, int]] = deque()  # (loop time, tokens) for the rate
        self._reroutes_s: deque[float] = deque(maxlen=_REROUTES_TOLD)
        self._downstream: Downstream | None = None
        if stage + 1 < spec.stages.count:
            self._downstream = Downstream(
                range(stage + 1, spec.stages.count),
                transport,
                replicas,
                compute.format,
                lane,
                random.Random(rng.getrandbits(64)),
                self._note,
                decisions,
            )
        if stage == 0:
            self.driver = Driver(
                spec,
                me=me,
                incarnation=incarnation,
                transport=transport,
                replicas=replicas,
                compute=compute,
                lane=lane,
                ledger=ledger,
                downstream=self._downstream,
                stepped=stepped,
                event=self._note,
                rng=random.Random(rng.getrandbits(64)),
                added=added,
                stages=stages,
            )
        else:
            self.hop = Hop(
                spec,
                stage,
                me=me,
                transport=transport,
                replicas=replicas,
                compute=compute,
                lane=lane,
                ledger=ledger,
                downstream=self._downstream,
                stepped=stepped,
                event=self._note,
                stages=stages,
            )

    def serve(self) -> None:
        """Register with the transport."""
        if self.driver is not None:
            self.driver.serve()
        if self.hop is not None:
            self.hop.serve()

    async def run(self, next_batch: Callable[[], Awaitable[torch.Tensor]] | None) -> None:
        """`next_batch` is what a driver feeds."""
        if self.hop is not None:
            await self.hop.run()
        elif self.driver is not None and next_batch is not None:
            await self.driver.run(next_batch)

    async def drained(self) -> None:
        """Take nothing new; returns when nothing is held any more."""
        if self.driver is not None:
            await self.driver.drained()
        if self.hop is not None:
            self.hop.draining = True
            await self.hop.drained()

    def leave(self) -> None:
        """This peer is going: nothing waits any more for a replica where there is none."""
        if self._downstream is not None:
            self._downstream.successors.leave()

    def under_way(self) -> dict[PeerId, int]:
        """How many micro-batches each replica of the next stage has been asked for by this one."""
        return self._downstream.successors.under_way() if self._downstream is not None else {}

    def tokens_per_s(self) -> float:
        """Committed tokens a second over the last _RATE_WINDOW_S."""
        now, tokens = asyncio.get_running_loop().time(), self.ledger.tokens
        self._marks.append((now, tokens))
        while len(self._marks) > 2 and now - self._marks[0][0] > _RATE_WINDOW_S:
            self._marks.popleft()
        then, before = self._marks[0]
        elapsed_s = now - then
        return (tokens - before) / elapsed_s if elapsed_s > 0 else 0.0

    def status(self) -> dict[str, object]:
        """Figures for `shoal status`, JSON-able, keys stable."""
        ledger, downstream = self.ledger, self._downstream
        figures: dict[str, object] = {
            "tokens": ledger.tokens,
            "tokens_per_s": self.tokens_per_s(),
            "micro_batches": len(ledger),
            "duplicates_refused": ledger.duplicates_refused,
            "abandoned": ledger.abandoned,
            "dropped": ledger.dropped,
            "undecided": self.hop.undecided if self.hop is not None else 0,
            "retries": downstream.successors.retries if downstream is not None else 0,
            "adopted": downstream.adopted if downstream is not None else 0,
            "hedges": downstream.hedges if downstream is not None else 0,
            "next_stage": downstream.successors.status() if downstream is not None else [],
            "reroutes_s": list(self._reroutes_s),
        }
        if self.driver is not None:
            loss = self.driver.figures.loss
            figures |= {
                "loss": loss if math.isfinite(loss) else None,
                "chain_s": self.driver.figures.chain_s,
                "restarted": self.driver.figures.restarted,
                "lost": self.driver.commits.lost,
                "owed": self.driver.commits.owed,
                "in_flight": self.driver.in_flight,
            }
        return figures

    def _note(self, kind: str, data: dict[str, object]) -> None:
        if kind == "reroute":
            self._reroutes_s.append(float(str(data["seconds"])))
        self._event(kind, data)
