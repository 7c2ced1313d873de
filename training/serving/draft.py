"""A small model beside the client that guesses what the swarm's model will say.

Any Llama-layout checkpoint of the run's vocabulary will do: how good it is decides how fast a text comes, and
nothing else. It draws as the last stage does, with the same random number at the same position, so drawn
texts are guessed as well as likeliest ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from shoal.protocol.errors import UsageError
from shoal.training.checkpoint.hf_import import import_hf
from shoal.training.checkpoint.reshape import load_stage
from shoal.training.lane import Lane
from shoal.training.model.layout import stage_layout
from shoal.training.serving.ahead import alike
from shoal.training.serving.cached_stage import CachedStage, Span
from shoal.training.serving.messages import SamplingOptions
from shoal.training.serving.sampling import next_token
from shoal.training.spec import RunSpec
from shoal.training.work import Work

_CHUNK_ROWS = 256  # of a prompt, at once


class DraftModel:
    """Weights of one, whole and on the CPU; texts side by side share it."""

    def __init__(self, spec: RunSpec, weights: torch.Tensor, lane: Lane) -> None:
        """`weights` fp32 [size] of all layers in one stage; `lane` computes, apart from the event loop."""
        self.spec, self.lane, self.weights = spec, lane, weights
        self.stage = CachedStage(spec, stage_layout(spec, range(spec.model.layers)))

    def require(self, spec: RunSpec) -> None:
        """Raises UsageError unless its tokens mean what those of the run mean."""
        mine, theirs = self.spec.data, spec.data
        known = theirs.tokenizer == "bytes" or theirs.tokenizer_blake3 != ""
        if mine.vocabulary != theirs.vocabulary:
            told = f"its vocabulary has {mine.vocabulary} tokens, that of the run {theirs.vocabulary}"
        elif known and mine.tokenizer_blake3 != theirs.tokenizer_blake3:
            told = "its tokenizer is another one than the run's"
        else:
            return
        raise UsageError(f"this model cannot draft for this run: {told}")


def load_draft(folder: Path) -> tuple[RunSpec, torch.Tensor]:
    """Spec and weights of a Hugging Face folder. Blocking. Raises UsageError, StorageError."""
    with tempfile.TemporaryDirectory(prefix="shoal-draft-") as store:
        checkpoint = import_hf(folder, Path(store), 1)
        spec = checkpoint.spec
        return spec, load_stage(checkpoint, spec, stage_layout(spec, range(spec.model.layers))).weights


class Drafting:
    """The draft of one text."""

    def __init__(self, model: DraftModel, options: SamplingOptions) -> None:
        self._model, self._options = model, options
        self._cache = model.stage.cache(model.weights)
        self._cached: list[int] = []  # tokens whose positions are in it

    async def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next tokens; fewer, or none, where the draft's model ends."""
        count = min(count, self._model.spec.model.sequence - len(tokens))
        return await self._model.lane.run(Work.SERVE, self._guess, list(tokens), count) if count > 0 else []

    def _guess(self, tokens: list[int], count: int) -> list[int]:
        text = tokens
        while len(text) < len(tokens) + count:
            text = [*text, next_token(self._logits(text), text, self._options)]
        return text[len(tokens) :]

    def _logits(self, text: list[int]) -> torch.Tensor:
        """fp32 [vocabulary], of the token after `text`."""
        stage, weights = self._model.stage, self._model.weights
        start = min(alike(self._cached, text), len(text) - 1)
        self._cache.trim(start)
        while start < len(text):
            rows = torch.tensor(text[start : start + _CHUNK_ROWS])
            hidden = stage.forward(weights, rows, [Span(self._cache, start, len(rows))])
            start += len(rows)
        self._cached = text
        return stage.logits(weights, hidden[-1:])[0]
