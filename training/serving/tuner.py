"""Tuning through frozen stages, at the client: a batch goes through the chain and back, its adapter with it.

What went into each stage stays here until the batch is back: a server that is lost is replaced by another one
that gets the same request. All stages of a batch stay on the versions they began with.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from shoal.compression.codec import bytes_of
from shoal.protocol.errors import (
    AccessError,
    Busy,
    MessageInvalid,
    NetworkError,
    ProtocolViolation,
    ShoalError,
    StageEmpty,
    VersionRetired,
)
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Channel, Transport, call
from shoal.training.methods import at_stage
from shoal.training.model.layout import StageLayout, stage_layout
from shoal.training.model.lowrank import AdapterForm
from shoal.training.outer.context import Offload
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.replicas import Replicas
from shoal.training.serving.choice import choose
from shoal.training.serving.messages import HIDDEN, LOGITS, LOSS, TUNE, TunedSpan, TuneSpan
from shoal.training.spec import RunSpec

PATIENCE_S = 30.0
_CALL_S = 120.0
_AVOID_S = 2.0
_PAUSE_S = (0.1, 0.4)
_RESTARTS = 3  # of one batch, when a version is retired under it
Tensors = Mapping[str, torch.Tensor]
NO_ADAPTER = AdapterForm(rank=0, targets=())


@dataclass(slots=True, eq=False)
class _Trip:
    """One batch on its way."""

    tokens: torch.Tensor
    form: AdapterForm
    tensors: Tensors
    entered: list[torch.Tensor] = field(default_factory=list)  # what went into each stage
    pins: dict[int, bytes] = field(default_factory=dict)  # stage -> version
    avoid: frozenset[PeerId] = frozenset()
    servers: list[PeerId] = field(default_factory=list)  # that answered


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """Logits [B, T, vocabulary], and what went into each stage but the first, [B, T, width]."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    servers: tuple[PeerId, ...]  # by stage


class Tuner:
    """Asks the stages of one run. Batches may go side by side."""

    def __init__(
        self,
        spec: RunSpec,
        transport: Transport,
        replicas: Replicas,
        rng: random.Random,
        *,
        patience_s: float = PATIENCE_S,
        offload: Offload,
    ) -> None:
        self._spec, self._transport, self._replicas, self._rng = spec, transport, replicas, rng
        self._patience_s, self.offload = patience_s, offload
        self.layouts: list[StageLayout] = [stage_layout(spec, layers) for layers in stage_ranges(spec)]
        self._avoid_until_s: dict[PeerId, float] = {}
        self.replaced = 0  # servers, since the start

    async def logits(
        self, tokens: torch.Tensor, form: AdapterForm = NO_ADAPTER, tensors: Tensors | None = None
    ) -> Answer:
        """Of tokens int64 [B, T]. Raises StageEmpty, Busy, AccessError and MessageInvalid."""
        for _ in range(_RESTARTS):
            try:
                return await self._answer(_Trip(tokens, form, tensors or {}))
            except VersionRetired:
                continue
        raise VersionRetired(f"the model changed {_RESTARTS} times under one batch; ask again")

    async def again(
        self, tokens: torch.Tensor, versions: dict[int, bytes], avoid: frozenset[PeerId]
    ) -> Answer:
        """On these versions, by none of these servers. Raises VersionRetired, StageEmpty without others."""
        return await self._answer(_Trip(tokens, NO_ADAPTER, {}, pins=dict(versions), avoid=avoid))

    async def _answer(self, trip: _Trip) -> Answer:
        await self._forward(trip)
        _, out = await self._ask(len(self.layouts) - 1, trip, LOGITS)
        rows, start = out.view(*self._rows(trip)[:2], self._spec.data.vocabulary), trip.form.prompt
        hidden = tuple(entered[:, start:] for entered in trip.entered[1:])
        return Answer(rows[:, start:], hidden, tuple(trip.servers))

    async def loss(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        form: AdapterForm,
        tensors: Tensors,
        *,
        gradients: bool,
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """Mean nats of labels int64 [B, T] (below 0: not counted), and its gradient in each tensor.

        `tensors`: of all stages, by the names of `AdapterForm.shapes`. Raises what `logits` raises.
        """
        if not bool((labels[:, 1:] >= 0).any()):
            raise MessageInvalid("no label counts: the first of a sequence has nothing before it")
        for _ in range(_RESTARTS):
            trip = _Trip(tokens, form, tensors)
            try:
                await self._forward(trip)
                return await self._back(trip, labels.clamp(min=-1), gradients)
            except VersionRetired:
                continue
        raise VersionRetired(f"the model changed {_RESTARTS} times under one batch; ask again")

    async def _forward(self, trip: _Trip) -> None:
        """To the last stage's door."""
        trip.entered.append(trip.tokens)
        for stage in range(len(self.layouts) - 1):
            _, out = await self._ask(stage, trip, HIDDEN)
            trip.entered.append(out.view(self._rows(trip)))

    async def _back(
        self, trip: _Trip, labels: torch.Tensor, gradients: bool
    ) -> tuple[float, dict[str, torch.Tensor]]:
        last = len(self.layouts) - 1
        loss, out = await self._ask(last, trip, LOSS, labels, back=gradients)
        found: dict[str, torch.Tensor] = {}
        for stage in range(last, -1, -1) if gradients else ():
            gradient = None
            if stage:
                count = trip.entered[stage].numel()
                gradient, out = out[:count], out[count:]
            for name, shape in trip.form.shapes(self.layouts[stage]).items():
                count = shape[0] * shape[1]
                found[name], out = out[:count].view(shape), out[count:]
            if gradient is not None:
                _, out = await self._ask(stage - 1, trip, HIDDEN, gradient, back=True)
        return loss, found

    def _rows(self, trip: _Trip) -> tuple[int, int, int]:
        sequences, length = trip.tokens.shape
        return sequences, trip.form.prompt + length, self._spec.model.width

    async def _ask(
        self, stage: int, trip: _Trip, output: str, more: torch.Tensor | None = None, back: bool = False
    ) -> tuple[float, torch.Tensor]:
        """Loss and flat fp32 answer of one stage, from whichever replica gives it."""
        form, layout = trip.form, self.layouts[stage]
        request = TuneSpan(
            stage=stage,
            version=trip.pins.get(stage, b""),
            sequences=trip.tokens.shape[0],
            length=trip.tokens.shape[1],
            output=output,
            back=back,
            rank=form.rank,
            alpha=form.alpha,
            targets=form.targets,
            prompt=form.prompt,
        )
        own = [trip.tensors[name].detach() for name in form.shapes(layout)]
        parts = [trip.entered[stage], *own, *([] if more is None else [more])]
        payload: bytes = await self.offload(_packed, parts)
        wanted = self._expected(trip, stage, output, back)
        trip.pins[stage], loss, out = await self._from_anybody(request, payload, wanted, trip)
        return loss, out

    def _expected(self, trip: _Trip, stage: int, output: str, back: bool) -> int:
        sequences, length, width = self._rows(trip)
        if back:
            return trip.form.count(self.layouts[stage]) + (sequences * length * width if stage else 0)
        each = {HIDDEN: width, LOGITS: self._spec.data.vocabulary, LOSS: 0}[output]
        return sequences * length * each

    async def _from_anybody(
        self, request: TuneSpan, payload: bytes, wanted: int, trip: _Trip
    ) -> tuple[bytes, float, torch.Tensor]:
        loop = asyncio.get_running_loop()
        until_s, reason = loop.time() + self._patience_s, "no replica of it is known"
        while loop.time() < until_s:
            known = [one for one in self._replicas.of_stage(request.stage) if one.peer not in trip.avoid]
            if trip.avoid and not known:
                raise StageEmpty(f"no other peer serves stage {request.stage}")
            peer = choose(known, self._avoid_until_s, loop.time(), self._rng.random())
            if peer is None:
                await asyncio.sleep(self._rng.uniform(*_PAUSE_S))
                continue
            try:
                found = await self._from(peer, request, payload, wanted)
                trip.servers.append(peer)
                return found
            except (VersionRetired, MessageInvalid, AccessError):
                raise
            except ShoalError as error:
                reason = str(error)
                avoid_s = error.retry_after_s if isinstance(error, Busy) else _AVOID_S
                self._avoid_until_s[peer] = loop.time() + avoid_s * self._rng.uniform(0.8, 1.2)
                self.replaced += not isinstance(error, Busy)
                if isinstance(error, NetworkError | ProtocolViolation):
                    self._replicas.suspect(peer, f"tune: {error}")
        raise StageEmpty(f"nobody tunes stage {request.stage} since {self._patience_s:g} s: {reason}")

    async def _from(
        self, peer: PeerId, request: TuneSpan, payload: bytes, wanted: int
    ) -> tuple[bytes, float, torch.Tensor]:
        """Version, loss and the flat answer. Raises ProtocolViolation for what no honest server sends."""
        message = await call(
            self._transport,
            peer,
            at_stage(request.stage, TUNE),
            request,
            TunedSpan,
            timeout_s=_CALL_S,
            payload=payload,
            max_payload_bytes=4 * wanted,
            channel=Channel.BULK,
        )
        if message.payload.nbytes != 4 * wanted:
            raise ProtocolViolation(f"{message.payload.nbytes} bytes came back, {4 * wanted} were due")
        if request.version and message.header.version != request.version:
            raise ProtocolViolation("it was computed on another version than was asked for")
        out = await self.offload(_values, message.payload)
        return message.header.version, message.header.loss, out


def _values(payload: memoryview) -> torch.Tensor:
    """fp32. Raises ProtocolViolation unless they are finite."""
    out = torch.frombuffer(bytearray(payload), dtype=torch.float32) if payload else torch.empty(0)
    if not bool(torch.isfinite(out).all()):
        raise ProtocolViolation("NaN or infinity came back")
    return out


def _packed(parts: Sequence[torch.Tensor]) -> bytes:
    return b"".join(map(_bytes, parts))


def _bytes(tensor: torch.Tensor) -> bytes:
    wire = tensor.to(torch.float32 if tensor.is_floating_point() else torch.int32)
    return bytes(bytes_of(wire.contiguous().flatten()))
