"""What one stage computes for one micro-batch: forward, the two halves of backward, and the inner step.

No network here. `Hop` and `Driver` run these functions on the compute lane, where one runs at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from shoal.training.lane import Lane
from shoal.training.model.split import Tape, note_embedding
from shoal.training.model.stage import StageModel
from shoal.training.pipeline.payload import PayloadFormat
from shoal.training.spec import RunSpec
from shoal.training.weights import Version, Weights
from shoal.training.work import Work


def _nothing() -> torch.Tensor:
    return torch.empty(0, 1, dtype=torch.int64)


@dataclass(slots=True, eq=False)
class Passage:
    """One micro-batch on its way through this stage: what backward needs, then what commit needs."""

    tokens: torch.Tensor = field(default_factory=_nothing)  # int64 [B, T+1]
    inputs: torch.Tensor | None = None  # hidden [B, T, width], None at the first stage; the leaf of the graph
    output: torch.Tensor | None = None  # hidden states, or the loss at the last stage
    version: Version | None = None
    tape: Tape = field(default_factory=Tape)

    @property
    def token_count(self) -> int:
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)


class StageCompute:
    """The numeric half of a replica."""

    def __init__(
        self,
        spec: RunSpec,
        model: StageModel,
        weights: Weights,
        device: str,
        learning_rate: Callable[[], float],
    ) -> None:
        self.model = model
        self.weights = weights
        self.format = PayloadFormat.of(spec)
        self.device = device
        self._dtype = getattr(torch, spec.model.dtype)
        self._recompute = spec.inner.recompute and not model.layout.last
        self._learning_rate = learning_rate
        slot = model.layout.slots[0]
        self._embedding = (slot.start, slot.count)

    def receive(self, passage: Passage, payload: memoryview, sequences: int, codec: str) -> None:
        """`forward` of the activations that came in this codec. Raises MessageInvalid."""
        columns = self.format.length + 1
        split = self.format.token_bytes(sequences, columns)
        passage.tokens = self.format.unpack_tokens(payload, sequences, columns).to(self.device)
        passage.inputs = self.format.unpack_hidden(payload[split:], sequences, codec, self.device)
        self.forward(passage)

    def forward(self, passage: Passage) -> None:
        """Run the stage; at the last one the output is the loss.

        Takes a weight version, which `backward` or `drop` gives back.
        """
        passage.version = self.weights.take()
        flat, layout, tokens = passage.version.flat, self.model.layout, passage.tokens
        hidden = passage.inputs
        if hidden is None:
            hidden = self.model.embed(flat, tokens[:, :-1])
        passage.inputs = hidden.to(self._dtype).detach().requires_grad_()
        if self._recompute:
            with torch.no_grad():
                passage.output = self.model.blocks(flat, passage.inputs, None)
            return
        output = self.model.blocks(flat, passage.inputs, passage.tape)
        if layout.last:
            output = self.model.loss(flat, output, tokens[:, 1:], passage.tape)
        passage.output = output

    def pack(self, passage: Passage, codec: str) -> memoryview:
        """What the next stage gets. Raises MessageInvalid for an output that is not finite."""
        if passage.output is None:
            raise RuntimeError("nothing to send of a passage that has ended")
        return self.format.pack(passage.tokens, passage.output, codec)

    def backward(
        self, passage: Passage, gradient: memoryview | None, arrived: str, upstream: str
    ) -> tuple[memoryview, float]:
        """The gradient for upstream (empty at the first stage) and, at the last stage, the loss sum.

        `gradient` came from the next stage in the codec `arrived`, None at the last stage; what is answered
        is in the codec `upstream`. The weight gradient stays on the tape.
        A loss of NaN says that the micro-batch overflows here: nobody else can do better with it.
        Raises MessageInvalid for a gradient that does not fit; the passage may then be tried again.
        """
        if passage.inputs is None or passage.output is None:
            raise RuntimeError("backward of a passage that has ended")
        output_gradient = None
        if gradient is not None:
            batch = passage.output.shape[0]
            output_gradient = self.format.unpack_hidden(gradient, batch, arrived, self.device).to(self._dtype)
        input_gradient, loss = self.input_gradient(passage, output_gradient)
        if self.model.layout.first or math.isnan(loss):
            return memoryview(b""), loss
        return self.format.pack_hidden(input_gradient, upstream), loss

    def input_gradient(
        self, passage: Passage, output_gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor, float]:
        """Of the hidden states that came in, and the loss sum: NaN if the micro-batch overflows."""
        if passage.inputs is None or passage.output is None:
            raise RuntimeError("backward of a passage that has ended")
        layout = self.model.layout
        loss = float(passage.output.detach()) if output_gradient is None else 0.0
        if self._recompute and passage.version is not None:
            passage.output = self.model.blocks(passage.version.flat, passage.inputs, passage.tape)
        (input_gradient,) = torch.autograd.grad(passage.output, passage.inputs, output_gradient)
        if not bool(torch.isfinite(input_gradient).all()):
            loss = math.nan
        if layout.first:
            note_embedding(passage.tape, *self._embedding, passage.tokens[:, :-1], input_gradient)
        self.drop(passage)
        return input_gradient, loss

    def add(self, passage: Passage) -> bool:
        """CommitChain: add the weight gradient; make the inner step if it is due (True when it was made)."""
        self.weights.add(passage.tape)
        return self.count(passage)

    def count(self, passage: Passage) -> bool:
        """Its tokens are in the gradient; make the inner step if it is due (True when it was made)."""
        self.weights.pending_tokens += passage.token_count
        if not self.weights.due():
            return False
        self.weights.step(self._learning_rate())
        return True

    def drop(self, passage: Passage) -> None:
        """Let go of the weight version and the graph; the tape stays. On the lane; idempotent."""
        passage.inputs = passage.output = None
        if passage.version is not None:
            self.weights.release(passage.version)
            passage.version = None


class Boundary:
    """What a passage sends to the next stage, encoded once for each codec that a link asks for."""

    def __init__(self, compute: StageCompute, lane: Lane, passage: Passage) -> None:
        self._compute = compute
        self._lane = lane
        self._passage = passage
        self._payloads: dict[str, memoryview] = {}

    def prepare(self, codec: str) -> None:
        """Encode now; on the lane."""
        self._payloads[codec] = self._compute.pack(self._passage, codec)

    async def payload(self, codec: str) -> memoryview:
        """The bytes in a codec. Raises MessageInvalid for an output that is not finite."""
        if codec not in self._payloads:
            await self._lane.run(Work.UPDATE, self.prepare, codec)
        return self._payloads[codec]
