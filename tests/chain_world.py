"""A pipeline without a network: the stages' real compute and the real bytes of every hop, in one loop.

For what codecs do to learning: `Chain` trains, each hop in a codec drawn for the micro-batch, and scores
held-out text through the same wire.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic
import torch

from shoal.training.lane import InlineLane
from shoal.training.model.layout import genesis, stage_layout
from shoal.training.model.stage import StageModel
from shoal.training.partition import stage_ranges
from shoal.training.pipeline.compute import Passage, StageCompute
from shoal.training.spec import RunSpec
from shoal.training.weights import Weights, learning_rate

HELD_OUT_SHARE = 0.05
SCORED = 8  # micro-batches


@dataclass(frozen=True, slots=True)
class Text:
    """Bytes of the standard library's own source, cut in two."""

    training: torch.Tensor
    held_out: torch.Tensor

    @classmethod
    def of(cls, folders: Sequence[Path]) -> Text:
        data = b"\n".join(path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py")))
        tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        cut = int(len(tokens) * (1 - HELD_OUT_SHARE))
        return cls(tokens[:cut], tokens[cut:])


def draw(text: torch.Tensor, spec: RunSpec, rng: random.Random) -> torch.Tensor:
    """A micro-batch [B, T+1] from random places."""
    length = spec.model.sequence + 1
    starts = [rng.randrange(len(text) - length) for _ in range(spec.inner.micro_batch_sequences)]
    return torch.stack([text[start : start + length] for start in starts])


class Chain:
    """All stages; `codec()` names the codec of the next hop of a micro-batch."""

    def __init__(self, spec: RunSpec, codec: Callable[[], str], noise: float = 0.0) -> None:
        """`noise`: relative to what crosses a hop, added to it; for negative controls."""
        self.spec = spec
        self.tokens = 0
        self._codec = codec
        self._noise = noise
        self._generator = torch.Generator().manual_seed(spec.run.seed)
        self.stages = [self._stage(layers) for layers in stage_ranges(spec)]

    @classmethod
    def tiny(cls, codec: str, seed: int, noise: float = 0.0) -> Chain:
        """Small enough for a test: four stages of one layer, three boundaries."""
        values = RunSpec().model_dump()
        values["run"]["seed"] = seed
        values["model"] |= {"layers": 4, "width": 64, "feedforward": 160, "sequence": 64}
        values["stages"]["count"] = 4
        values["inner"] |= {"inner_tokens": 512, "warmup_tokens": 5_000, "total_tokens": 10**6}
        values["compression"]["activations"] = codec
        return cls(RunSpec.model_validate(values), lambda: codec, noise)

    def train(self, tokens: torch.Tensor) -> None:
        """One micro-batch there and back, and its weight gradients; inner steps where they are due."""
        passages, codecs = self._forward(tokens)
        gradient: memoryview | None = None
        arrived = ""
        for stage, passage, codec in reversed([*zip(self.stages, passages, ["", *codecs], strict=True)]):
            gradient, _ = stage.backward(passage, gradient, arrived, codec)
            arrived = codec
        for stage, passage in zip(self.stages, passages, strict=True):
            stage.add(passage)
        self.tokens += passages[0].token_count

    def loss(self, batches: Sequence[torch.Tensor]) -> float:
        """Nats a token."""
        total = 0.0
        for tokens in batches:
            passages, _ = self._forward(tokens)
            assert passages[-1].output is not None
            total += float(passages[-1].output.detach()) / passages[-1].token_count
            for stage, passage in zip(self.stages, passages, strict=True):
                stage.drop(passage)
        return total / len(batches)

    def _forward(self, tokens: torch.Tensor) -> tuple[list[Passage], list[str]]:
        passages, codecs = [Passage(tokens)], []
        self.stages[0].forward(passages[0])
        for before, stage in zip(self.stages, self.stages[1:], strict=False):
            codec = self._codec()
            self._disturb(passages[-1])
            passage = Passage()
            payload = memoryview(bytearray(before.pack(passages[-1], codec)))
            stage.receive(passage, payload, tokens.shape[0], codec)
            passages.append(passage)
            codecs.append(codec)
        return passages, codecs

    def _disturb(self, passage: Passage) -> None:
        if self._noise and passage.output is not None:
            noise = torch.randn(passage.output.shape, generator=self._generator)
            scale = self._noise * passage.output.detach().std()
            passage.output = passage.output + noise * scale

    def _stage(self, layers: range) -> StageCompute:
        layout = stage_layout(self.spec, layers)
        weights = Weights(self.spec, layout, genesis(self.spec, layout), InlineLane(), "cpu")
        model = StageModel(self.spec, layout)
        return StageCompute(self.spec, model, weights, "cpu", lambda: learning_rate(self.spec, self.tokens))


def learn(chain: Chain, steps: int) -> float:
    """Held-out loss in nats after so many micro-batches. The same seed sees the same text."""
    text = Text.of([Path(pydantic.__file__).parent])  # of a version that constraints.txt fixes
    rng = random.Random(chain.spec.run.seed)
    for _ in range(steps):
        chain.train(draw(text.training, chain.spec, rng))
    rng = random.Random(0)
    return chain.loss([draw(text.held_out, chain.spec, rng) for _ in range(SCORED)])
