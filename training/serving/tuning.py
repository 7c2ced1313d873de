"""Tuning through frozen stages, at a server: forward and backward of one stage with the caller's adapter.

Nothing is kept between two requests: the way back brings its input along and computes forward once more. So
any replica can answer any request, and adapters of many callers meet the same base. Method `tune`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from shoal.compression.codec import bytes_of
from shoal.protocol import limits
from shoal.protocol.errors import Busy, MessageInvalid, Stale
from shoal.protocol.transport import Channel, Message, Stream, Transport
from shoal.training.lane import Lane
from shoal.training.methods import at_stage
from shoal.training.model.layout import StageLayout
from shoal.training.model.lowrank import PROMPT, AdapterForm, LowRank
from shoal.training.model.stage import Held, StageModel
from shoal.training.serving.messages import HIDDEN, LOSS, TUNE, TunedSpan, TuneSpan
from shoal.training.serving.server import CLIENTS
from shoal.training.serving.versions import ServingVersion, Versions
from shoal.training.spec import RunSpec
from shoal.training.work import Work

_AT_ONCE = 4  # requests in memory; the lane takes one at a time
_RETRY_S = 0.5
_SEQUENCES = 8  # of the model's full length: what a request may have in positions
_IGNORED = -1


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A request, taken apart and checked."""

    request: TuneSpan
    form: AdapterForm
    entered: torch.Tensor  # tokens [B, T] or hidden [B, P + T, width]
    tensors: dict[str, torch.Tensor]
    labels: torch.Tensor | None
    gradient: torch.Tensor | None


class TuningServer:
    """Serves one stage. `serve` registers it."""

    def __init__(
        self,
        spec: RunSpec,
        stage: int,
        layout: StageLayout,
        *,
        transport: Transport,
        lane: Lane,
        versions: Versions,
        device: str,
    ) -> None:
        self._spec, self._stage, self._layout = spec, stage, layout
        self._transport, self._lane, self._versions, self._device = transport, lane, versions, device
        self._dtype: torch.dtype = getattr(torch, spec.model.dtype)
        self._model = StageModel(spec, layout)
        self._requests = 0

    def serve(self) -> None:
        """Register with the transport."""
        self._transport.serve(at_stage(self._stage, TUNE), self._answer, CLIENTS, Channel.BULK)

    async def _answer(self, stream: Stream) -> None:
        if self._requests >= _AT_ONCE:
            raise Busy(f"{self._requests} requests are being tuned here", _RETRY_S)
        self._requests += 1
        try:
            message = await stream.receive(TuneSpan, max_payload_bytes=self._most_bytes())
            version = self._versions.get(message.header.version)
            loss, found = await self._lane.run(Work.SERVE, self._work, message, version)
            await stream.send(TunedSpan(version.name, loss), found)
        finally:
            self._requests -= 1

    def _work(self, message: Message[TuneSpan], version: ServingVersion) -> tuple[float, memoryview]:
        """On the lane. Raises MessageInvalid, Stale."""
        job = self._job(message.header, message.payload)
        return self._compute(job, version.weights(self._dtype, self._device))

    def _most_bytes(self) -> int:
        values = 2 * _SEQUENCES * self._spec.model.sequence * self._spec.model.width
        return 4 * (values + self._layout.size) + limits.MIB

    def _job(self, request: TuneSpan, payload: memoryview) -> _Job:
        """Raises MessageInvalid for what does not fit the stage, Stale for another stage's request."""
        layout, model = self._layout, self._spec.model
        if request.stage != self._stage:
            raise Stale(f"asked for stage {request.stage}, this peer holds stage {self._stage}")
        length = request.prompt + request.length
        if length > model.sequence or request.sequences * length > _SEQUENCES * model.sequence:
            raise MessageInvalid(
                f"{request.sequences} sequences of {length}; this model takes {model.sequence} positions, "
                f"and {_SEQUENCES * model.sequence} at once"
            )
        if (request.output == HIDDEN) == layout.last:
            raise MessageInvalid(f"stage {self._stage} gives no {request.output}")
        form = AdapterForm(request.rank, request.alpha, request.targets, request.prompt)
        reader = _Reader(payload)
        ids, rows = (request.sequences, request.length), (request.sequences, length, model.width)
        entered = reader.ids(ids, self._spec.data.vocabulary) if layout.first else reader.values(rows)
        tensors = {name: reader.values(shape) for name, shape in form.shapes(layout).items()}
        labels = reader.ids(ids, self._spec.data.vocabulary, _IGNORED) if request.output == LOSS else None
        gradient = reader.values(rows) if request.back and request.output == HIDDEN else None
        reader.end()
        if request.back and labels is None and gradient is None:
            raise MessageInvalid("there is no way back from logits; ask for the loss")
        return _Job(request, form, entered, tensors, labels, gradient)

    def _compute(self, job: _Job, weights: Held) -> tuple[float, memoryview]:
        """The loss where it was asked for, and the answer's payload."""
        with torch.set_grad_enabled(job.request.back):
            tensors = {name: self._leaf(tensor, job) for name, tensor in job.tensors.items()}
            entered = job.entered.to(self._device) if self._layout.first else self._leaf(job.entered, job)
            hidden = entered
            if self._layout.first:
                hidden = self._model.embed(weights, entered)
                if PROMPT in tensors:
                    prompt = tensors[PROMPT].expand(hidden.shape[0], -1, -1)
                    hidden = torch.cat((prompt.to(hidden.dtype), hidden), dim=1)
            adapter = LowRank(job.form, self._layout, tensors)
            out = self._model.blocks(weights, hidden.to(self._dtype), adapter)
            if self._layout.last:
                out = self._model.logits(weights, out, adapter)
            out = out.float()
            loss = None if job.labels is None else _loss(out[:, job.request.prompt :], job.labels)
            if not job.request.back:
                return (0.0, _packed([out])) if loss is None else (float(loss), memoryview(b""))
        leaves = [*([] if self._layout.first else [entered]), *tensors.values()]
        goal = out if loss is None else loss
        given = None if job.gradient is None else job.gradient.to(self._device)
        found = torch.autograd.grad(goal, leaves, given) if leaves else ()
        return (0.0 if loss is None else float(loss.detach())), _packed(found)

    def _leaf(self, tensor: torch.Tensor, job: _Job) -> torch.Tensor:
        """In the type that is computed with; its gradient comes back in fp32."""
        return tensor.to(self._device, self._dtype).requires_grad_(job.request.back)


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each label from the position before it, as `transformers` counts it."""
    targets = labels[:, 1:].to(logits.device)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=_IGNORED)


def _packed(tensors: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> memoryview:
    flat = [tensor.detach().to("cpu", torch.float32).flatten() for tensor in tensors]
    if not all(bool(torch.isfinite(one).all()) for one in flat):
        raise MessageInvalid("the result is not finite; take a lower learning rate")
    return bytes_of(torch.cat(flat)) if flat else memoryview(b"")


class _Reader:
    """A payload's tensors, one after another."""

    def __init__(self, payload: memoryview) -> None:
        self._payload, self._at = payload, 0

    def values(self, shape: tuple[int, ...]) -> torch.Tensor:
        """fp32, finite. Raises MessageInvalid."""
        found = self._take(torch.float32, shape)
        if not bool(torch.isfinite(found).all()):
            raise MessageInvalid("the request holds NaN or infinity")
        return found

    def ids(self, shape: tuple[int, ...], vocabulary: int, least: int = 0) -> torch.Tensor:
        """int64 from `least` to below the vocabulary. Raises MessageInvalid."""
        found = self._take(torch.int32, shape).long()
        if int(found.min()) < least or int(found.max()) >= vocabulary:
            raise MessageInvalid(f"an id lies outside the vocabulary of {vocabulary}")
        return found

    def end(self) -> None:
        """Raises MessageInvalid where more came."""
        if self._at != self._payload.nbytes:
            raise MessageInvalid(f"{self._payload.nbytes - self._at} bytes too many came")

    def _take(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        size = 4
        for extent in shape:
            size *= extent
        data = self._payload[self._at : self._at + size]
        if data.nbytes != size:
            raise MessageInvalid(f"{self._payload.nbytes} bytes came, at least {self._at + size} were due")
        self._at += size
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
