"""Asking the next stage: choose a replica, send the activations, wait for their gradient; retry elsewhere.

Used by the driver and by every hop but the last. Recovery is local: the caller keeps its output until it has
the gradient, so only the direct caller of a replica that fails retries, and retries never multiply.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from shoal.protocol.errors import Busy, MessageInvalid, PeerSilent, ShoalError, StageEmpty
from shoal.protocol.identity import PeerId
from shoal.protocol.limits import SUSPECT_AFTER_S
from shoal.protocol.transport import Channel, Transport
from shoal.training.pipeline.messages import Gradient, Link, MicroBatch, Propagate, Working, spans
from shoal.training.pipeline.replicas import Replicas
from shoal.training.pipeline.routing import Candidate, choose

_SMOOTHING = 0.2
_BACKOFF_S, _BACKOFF_CAP_S = 0.5, 30.0
_SLOWEST_BYTES_PER_S = 1e6  # a payload may take this long on top before its peer counts as silent
Event = Callable[[str, dict[str, object]], None]
T = TypeVar("T")


@dataclass(slots=True)
class _Record:
    """What this caller has learned about one replica."""

    in_flight: int = 0
    service_s: float = 0.0
    backlog_s: float = 0.0
    failures: int = 0
    closed_until_s: float = 0.0  # loop time; circuit breaker and BUSY


@dataclass(frozen=True, slots=True)
class Answer:
    """The gradient of a micro-batch and the chain that made it."""

    chain: tuple[Link, ...]
    loss: float
    gradient: memoryview


class Downstream:
    """The next stage, as one thing that answers."""

    def __init__(
        self,
        stages: range,
        transport: Transport,
        replicas: Replicas,
        gradient_bytes: Callable[[int], int],
        rng: random.Random,
        event: Event,
    ) -> None:
        """`stages`: the next one and all behind it; an answer's chain has a link for each."""
        self.stage = stages.start
        self._stages = stages
        self._transport = transport
        self._replicas = replicas
        self._gradient_bytes = gradient_bytes
        self._rng = rng
        self._event = event
        self._records: defaultdict[PeerId, _Record] = defaultdict(_Record)
        self._leaving = asyncio.Event()
        self.retries = 0

    def leave(self) -> None:
        """This peer is going: from now on nothing waits for a replica where there is none."""
        self._leaving.set()

    async def propagate(
        self,
        micro_batch: MicroBatch,
        chain: tuple[Link, ...],
        sequences: int,
        payload: memoryview,
        deadline: float,
        use: Callable[[Answer], Awaitable[T]],
    ) -> tuple[Answer, T]:
        """Ask until a replica answers, and what `use` made of the answer: the caller's backward.

        MessageInvalid from `use` counts against the replica, as no answer would, and another one is asked.
        `deadline` is loop time; raises StageEmpty or PeerSilent after it.
        """
        loop = asyncio.get_running_loop()
        failed_at: float | None = None
        while True:
            now = loop.time()
            if now >= deadline:
                raise PeerSilent(f"stage {self.stage} gave no gradient of {micro_batch.number} in time")
            peer = self._choose(now)
            if peer is None:
                await self._wait_for_replica(now, deadline)
                continue
            request = Propagate(
                micro_batch, self.stage, self._rng.getrandbits(64), chain, sequences, deadline - now
            )
            record = self._records[peer]
            try:
                answer = await self._ask(peer, request, payload, deadline)
                used = await use(answer)
            except Busy as busy:
                record.closed_until_s = loop.time() + busy.retry_after_s * self._rng.uniform(0.5, 1.5)
            except ShoalError as error:
                failed_at = failed_at if failed_at is not None else loop.time()
                self._failed(peer, record, error)
            else:
                record.failures = 0
                if failed_at is not None:
                    reroute_s = loop.time() - failed_at
                    self._event("reroute", {"stage": self.stage, "to": peer, "seconds": reroute_s})
                return answer, used

    def _choose(self, now: float) -> PeerId | None:
        candidates = []
        for replica in self._replicas.of_stage(self.stage):
            record = self._records[replica.peer]
            if now < record.closed_until_s:
                continue
            backlog_s = max(replica.backlog_s, record.backlog_s) if record.in_flight else replica.backlog_s
            candidates.append(
                Candidate(replica.peer, replica.rtt_s, backlog_s, record.in_flight, record.service_s)
            )
        chosen = choose(candidates, self._rng)
        return None if chosen is None else PeerId(chosen.peer)

    async def _wait_for_replica(self, now: float, deadline: float) -> None:
        """Until a replica appears, a breaker half-opens, or the deadline."""
        known = {replica.peer for replica in self._replicas.of_stage(self.stage)}
        if self._leaving.is_set() and not known:
            raise StageEmpty(f"stage {self.stage} has no replica, and this peer is leaving")
        openings = [self._records[peer].closed_until_s for peer in known]
        until = min([deadline, *openings])
        reasons: list[asyncio.Task[Any]] = [asyncio.create_task(self._replicas.changed())]
        if not self._leaving.is_set():
            reasons.append(asyncio.create_task(self._leaving.wait()))
        try:
            wait_s = max(until - now, 0.001)
            woken, _ = await asyncio.wait(reasons, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for reason in reasons:
                reason.cancel()
            await asyncio.gather(*reasons, return_exceptions=True)
        if not woken and until >= deadline:
            raise StageEmpty(
                f"stage {self.stage} has no replica to ask ({len(known)} known); waiting for one to join"
            )

    async def _ask(self, peer: PeerId, request: Propagate, payload: memoryview, deadline: float) -> Answer:
        record = self._records[peer]
        record.in_flight += 1
        try:
            async with asyncio.timeout_at(deadline):  # Working keeps a caller patient, but not for ever
                answer, header = await self._answer(peer, request, payload)
        except TimeoutError:
            raise PeerSilent(f"{peer} was still at it when the micro-batch's time was over") from None
        finally:
            record.in_flight -= 1
        known = record.service_s
        record.service_s = header.service_s if not known else known + _SMOOTHING * (header.service_s - known)
        record.backlog_s = header.backlog_s
        return answer

    async def _answer(self, peer: PeerId, request: Propagate, payload: memoryview) -> tuple[Answer, Gradient]:
        gradient_bytes = self._gradient_bytes(request.sequences)
        patience_s = SUSPECT_AFTER_S + gradient_bytes / _SLOWEST_BYTES_PER_S
        async with self._transport.open(peer, "propagate", Channel.BULK) as stream:
            await stream.send(request, payload)
            while True:
                try:
                    async with asyncio.timeout(patience_s):
                        message = await stream.receive(Working, Gradient, max_payload_bytes=gradient_bytes)
                except TimeoutError:
                    raise PeerSilent(f"{peer} said nothing for {patience_s:.1f} s while computing") from None
                if isinstance(message.header, Gradient):
                    break
        header: Gradient = message.header
        own = Link(self.stage, peer, request.attempt)
        if not spans(header.chain, self._stages) or header.chain[0] != own:
            raise MessageInvalid(
                f"{peer} answered with a chain that does not lead from it over stages {self._stages.start} "
                f"to {self._stages.stop - 1}"
            )
        return Answer(header.chain, header.loss, message.payload), header

    def _failed(self, peer: PeerId, record: _Record, error: ShoalError) -> None:
        """Open the breaker (exponential, jittered) and let the membership look into it."""
        self.retries += 1
        backoff_s = min(_BACKOFF_CAP_S, _BACKOFF_S * 2.0**record.failures) * self._rng.uniform(0.5, 1.5)
        record.failures += 1
        record.closed_until_s = asyncio.get_running_loop().time() + backoff_s
        self._replicas.suspect(peer, f"propagate: {error}")
        self._event("retry", {"stage": self.stage, "peer": peer, "reason": str(error)})
