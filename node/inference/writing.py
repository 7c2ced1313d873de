"""Texts from a swarm, above tokens: prompts in, pieces of text out. Needs no daemon: a transport is enough.

`Text` holds what all texts of a run share, `Writing` is one text while it is written. Called by the client
and by the gateway.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from shoal.node.inference.pieces import Decoder, StopFilter
from shoal.protocol.errors import MessageInvalid, UsageError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.protocol.wire import encode
from shoal.training.data.tokenizer import Tokenizer
from shoal.training.pipeline.replicas import Replicas
from shoal.training.serving.chain import ChainFigures, Generation
from shoal.training.serving.messages import STOP, SamplingOptions, TokenBias
from shoal.training.spec import RunSpec

_MOST_STOPS = 16
_STOP_CHARACTERS = 256


@dataclass(frozen=True)
class Options:
    """How to write. Temperature 0 is greedy; the same seed draws the same tokens."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()  # ends the text before it
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def sampling(self, end_of_document: int) -> SamplingOptions:
        """For the last stage. Raises UsageError for what lies outside its bounds."""
        if len(self.stop) > _MOST_STOPS or any(len(stop) > _STOP_CHARACTERS for stop in self.stop):
            raise UsageError(f"at most {_MOST_STOPS} stops of {_STOP_CHARACTERS} characters")
        options = SamplingOptions(
            temperature=float(self.temperature),
            top_p=float(self.top_p),
            top_k=self.top_k,
            repetition_penalty=float(self.repetition_penalty),
            seed=self.seed,
            bias=tuple(TokenBias(token, float(bias)) for token, bias in sorted(self.logit_bias.items())),
            stop=(end_of_document,),
        )
        try:
            encode(options)
        except MessageInvalid as error:
            raise UsageError(f"these options are out of bounds: {error}") from None
        return options


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text, and the token that completed it; None for what was left at the end."""

    text: str
    token: int | None


class Writing:
    """One text. `async with`, and iterate for its pieces; afterwards `finish` says why it ended."""

    def __init__(self, generation: Generation, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.prompt_tokens = len(generation.tokens)
        self.new_tokens = 0
        self.text = ""
        self.finish = ""
        self._generation = generation
        self._decoder, self._filter = Decoder(tokenizer), StopFilter(stops)

    async def __aenter__(self) -> Self:
        await self._generation.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._generation.__aexit__(*error)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises StageEmpty, Busy, VersionRetired and AccessError."""
        async for token in self._generation:
            self.new_tokens += 1
            yield self._piece(self._filter.add(self._decoder.add(token)), token)
            if self._filter.stopped:
                self.finish = STOP
                return
        rest = self._filter.add(self._decoder.rest())
        if not self._filter.stopped:
            rest += self._filter.rest()
        self.finish = STOP if self._filter.stopped else self._generation.finish
        if rest:
            yield self._piece(rest, None)

    def route(self) -> list[PeerId | None]:
        """The server of each stage now."""
        return self._generation.route()

    @property
    def figures(self) -> ChainFigures:
        """What became of its servers."""
        return self._generation.figures

    def _piece(self, text: str, token: int | None) -> Piece:
        self.text += text
        return Piece(text, token)


class Text:
    """Writes texts with the model of one run."""

    def __init__(
        self,
        spec: RunSpec,
        tokenizer: Tokenizer,
        transport: Transport,
        replicas: Replicas,
        rng: random.Random,
    ) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        self._transport, self._replicas, self._rng = transport, replicas, rng

    def writing(self, prompt: str | Sequence[int], options: Options) -> Writing:
        """A text that begins once it is entered. Raises UsageError for what this model cannot do.

        A prompt that is empty begins a document.
        """
        end = self.tokenizer.end_of_document
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        tokens = [int(token) for token in ids] or [end]
        try:
            generation = Generation(
                self.spec,
                self._transport,
                self._replicas,
                tokens,
                options.max_new_tokens,
                options.sampling(end),
                random.Random(self._rng.getrandbits(64)),
            )
        except MessageInvalid as error:
            raise UsageError(str(error)) from None
        return Writing(generation, self.tokenizer, options.stop)
