"""Forward only, along the stages, on the anchor: scores held-out text.

A driver asks the next stage, each hop the one after it; the last answers with the loss, which comes
back the way it went. Texts are written in sessions (`training.serving`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import torch

from shoal.protocol.errors import MessageInvalid, ShoalError, StageEmpty, Stale
from shoal.protocol.identity import Role
from shoal.protocol.transport import Channel, Stream, Transport, call
from shoal.training.lane import Lane
from shoal.training.methods import at_stage
from shoal.training.model.stage import StageModel
from shoal.training.pipeline.messages import Infer, Inferred
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.pipeline.replicas import Replicas
from shoal.training.spec import RunSpec
from shoal.training.work import Work

_ROLES = frozenset({Role.TRAINER, Role.OWNER})
_HOP_TIMEOUT_S = 20.0
_TRIES = 3


class InferenceHop:
    """Answers `infer` for one stage."""

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        *,
        transport: Transport,
        replicas: Replicas,
        model: StageModel,
        lane: Lane,
        anchor: Callable[[], Awaitable[tuple[int, torch.Tensor]]],
        rng: random.Random,
    ) -> None:
        self._spec = spec
        self.stage = stage
        self._transport = transport
        self._replicas = replicas
        self._model = model
        self._lane = lane
        self._anchor = anchor
        self._rng = rng
        self._format = PayloadFormat.of_inference(spec)
        self._codec = self._format.widest

    def serve(self) -> None:
        """Register with the transport; before it starts."""
        self._transport.serve(at_stage(self.stage, "infer"), self._infer, _ROLES, Channel.BULK)

    async def _infer(self, stream: Stream) -> None:
        most = self._spec.inner.micro_batch_sequences
        cap = self._format.token_bytes(most) + self._format.hidden_bytes(most, self._codec)
        message = await stream.receive(Infer, max_payload_bytes=cap)
        request: Infer = message.header
        if request.stage != self.stage:
            raise Stale(f"asked for stage {request.stage}, this peer holds stage {self.stage}")
        if not request.score:
            raise MessageInvalid("only scores are given here; texts are written in sessions")
        if request.sequences > most or request.length > self._format.length:
            raise MessageInvalid(
                f"{request.sequences} sequences of {request.length}; at most {most} of {self._format.length}"
            )
        await stream.send(Inferred(*await self._answer(request, message.payload)))

    async def score(self, tokens: torch.Tensor) -> float:
        """Mean loss in nats of tokens int64 [N, T+1] from here to the last stage. Raises StageEmpty."""
        total = 0.0
        for rows in torch.split(tokens, self._spec.inner.micro_batch_sequences):
            request = Infer(self.stage, rows.shape[0], rows.shape[1] - 1, True)
            loss, _ = await self._answer(request, self._format.pack(rows, None, self._codec))
            total += loss
        return total / (tokens.shape[0] * (tokens.shape[1] - 1))

    async def _answer(self, request: Infer, payload: memoryview) -> tuple[float, int]:
        """The summed loss, from this stage and those behind it, and the height it was scored at here."""
        height, weights = await self._anchor()
        forwarded, loss = await self._lane.run(Work.SERVE, self._compute, request, payload, weights)
        if forwarded is not None:
            onward = Infer(self.stage + 1, request.sequences, request.length, request.score)
            loss = await ask(self._transport, self._replicas, onward, forwarded, self._rng)
        return loss, height

    def _compute(
        self, request: Infer, payload: memoryview, weights: torch.Tensor
    ) -> tuple[memoryview | None, float]:
        """This stage's part: (payload for the next stage or None, loss)."""
        columns = request.length + 1
        tokens = self._format.unpack_tokens(payload, request.sequences, columns)
        with torch.no_grad():  # not inference_mode: what is cached there could not be trained with
            device = weights.device
            if self._model.layout.first:
                hidden = self._model.embed(weights, tokens[:, : request.length].to(device))
            else:
                body = payload[self._format.token_bytes(request.sequences, columns) :]
                hidden = self._format.unpack_hidden(
                    body, request.sequences, self._codec, str(device), request.length
                )
            hidden = self._model.blocks(weights, hidden, None)
            if not self._model.layout.last:
                return self._format.pack(tokens, hidden, self._codec), 0.0
            return None, float(self._model.loss(weights, hidden, tokens[:, 1:].to(device), None))


async def ask(
    transport: Transport,
    replicas: Replicas,
    request: Infer,
    payload: memoryview,
    rng: random.Random,
) -> float:
    """One stage's answer, from whichever replica gives it. Raises StageEmpty."""
    reasons: list[str] = []
    for _ in range(_TRIES):
        known = list(replicas.of_stage(request.stage))
        if not known:
            reasons.append("no replica known")
            await asyncio.sleep(rng.uniform(0.2, 0.6))
            continue
        peer = rng.choice(known).peer
        try:
            reply = await call(
                transport,
                peer,
                at_stage(request.stage, "infer"),
                request,
                Inferred,
                timeout_s=_HOP_TIMEOUT_S,
                payload=payload,
                channel=Channel.BULK,
            )
        except ShoalError as error:
            replicas.suspect(peer, f"infer: {error}")
            reasons.append(f"{peer}: {error}")
            continue
        return reply.header.loss
    raise StageEmpty(f"stage {request.stage} did not answer: {'; '.join(reasons)}")
