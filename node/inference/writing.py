"""Texts from a swarm, above tokens: prompts in, pieces of text out. Needs no daemon: a transport is enough.

`Text` holds what all texts of a run share, `Writing` is one text while it is written. Called by the client
and by the gateway.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from shoal.node.inference.pieces import Decoder, StopFilter
from shoal.protocol.errors import MessageInvalid, UsageError
from shoal.protocol.identity import PeerId
from shoal.protocol.transport import Transport
from shoal.protocol.wire import encode
from shoal.training.data.tokenizer import ByteTokenizer, Tokenizer
from shoal.training.pipeline.replicas import Replicas
from shoal.training.serving.audit import Auditor
from shoal.training.serving.chain import Generation
from shoal.training.serving.draft import DraftModel
from shoal.training.serving.messages import STOP, SamplingOptions, TokenBias
from shoal.training.serving.written import ChainFigures
from shoal.training.spec import RunSpec

_MOST_STOPS = 16
_STOP_CHARACTERS = 256
_SHORT_CHARACTERS = 1024  # up to so many a prompt is encoded in place; a longer one would hold up the loop


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

    def __init__(
        self,
        prompt: str | Sequence[int],
        begin: Callable[[Sequence[int]], Generation],
        tokenizer: Tokenizer,
        stops: Sequence[str],
        auditor: Auditor | None = None,
    ) -> None:
        """`begin` makes the generation of a prompt's tokens; it raises MessageInvalid for what cannot be.

        `auditor` gets a text that came to its end.
        """
        self.prompt_tokens = self.new_tokens = 0
        self.text = ""
        self.finish = ""
        self._prompt, self._begin, self._tokenizer = prompt, begin, tokenizer
        self._auditor = auditor
        self._generation: Generation | None = None  # once entered
        self._decoder, self._filter = Decoder(tokenizer), StopFilter(stops)

    async def __aenter__(self) -> Self:
        """Raises UsageError for a prompt that the model does not take."""
        prompt = self._prompt
        if not isinstance(prompt, str):
            tokens = [int(token) for token in prompt]
        elif len(prompt) <= _SHORT_CHARACTERS:
            tokens = self._encoded(prompt)
        else:
            tokens = await asyncio.to_thread(self._encoded, prompt)
        try:
            generation = self._begin(tokens or [self._tokenizer.end_of_document])
        except MessageInvalid as error:
            raise UsageError(str(error)) from None
        self.prompt_tokens = len(generation.tokens)
        self._generation = await generation.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        generation = self._entered
        if self._filter.stopped and self._auditor is not None and error[0] is None:
            await generation.end()
        await generation.__aexit__(*error)
        if self.finish and self._auditor is not None:
            self._auditor.ended(generation.written())

    def _encoded(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(prompt).tolist()
        return ids

    @property
    def _entered(self) -> Generation:
        if self._generation is None:
            raise UsageError("the text has not begun; use it as: async with client.writing(...) as writing")
        return self._generation

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Raises StageEmpty, Busy, VersionRetired and AccessError."""
        generation = self._entered
        async for token in generation:
            self.new_tokens += 1
            yield self._piece(self._filter.add(self._decoder.add(token)), token)
            if self._filter.stopped:
                self.finish = STOP
                return
        rest = self._filter.add(self._decoder.rest())
        if not self._filter.stopped:
            rest += self._filter.rest()
        self.finish = STOP if self._filter.stopped else generation.finish
        if rest:
            yield self._piece(rest, None)

    def route(self) -> list[PeerId | None]:
        """The server of each stage now; nothing before the text begins."""
        return self._generation.route() if self._generation is not None else []

    def standby(self) -> list[PeerId | None]:
        """Who goes on in whose place where one of them fails."""
        return self._generation.standby() if self._generation is not None else []

    @property
    def figures(self) -> ChainFigures:
        """What became of its servers."""
        return self._entered.figures

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
        draft: DraftModel | None = None,
    ) -> None:
        """Raises UsageError for a draft that speaks other tokens than the run."""
        if draft is not None:
            draft.require(spec)
        self.spec, self.tokenizer, self._draft = spec, tokenizer, draft
        self._transport, self._replicas, self._rng = transport, replicas, rng
        self.auditor: Auditor | None = None  # that checks a share of the texts

    def writing(self, prompt: str | Sequence[int], options: Options) -> Writing:
        """A text that begins once it is entered. Raises UsageError for options out of bounds.

        A prompt that is empty begins a document. Whether it fits the model shows at the latest when the text
        is entered, which raises UsageError as well: a long one is encoded then, in a thread.
        """
        most = self.spec.model.sequence
        if isinstance(prompt, str) and isinstance(self.tokenizer, ByteTokenizer) and len(prompt) >= most:
            raise UsageError(  # no token covers more than a byte
                f"a prompt of {len(prompt)} tokens or more; this model takes 1 to {most - 1} tokens of prompt"
            )
        sampling = options.sampling(self.tokenizer.end_of_document)
        rng = random.Random(self._rng.getrandbits(64))
        auditor = self.auditor if self.auditor is not None and self.auditor.draw() else None

        def begin(tokens: Sequence[int]) -> Generation:
            return Generation(
                self.spec,
                self._transport,
                self._replicas,
                tokens,
                options.max_new_tokens,
                sampling,
                rng,
                draft=self._draft,
                checked=auditor is not None,
            )

        return Writing(prompt, begin, self.tokenizer, options.stop, auditor)
