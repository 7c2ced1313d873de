"""Answers to one request: several texts written at once, as one body or as a stream of events.

`Answers` writes; `CompletionForm` and `ChatForm` say how what is written looks in each end point's JSON.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from shoal.node.inference.writing import Options, Writing

_AHEAD = 16  # pieces that wait for a slow reader; then the texts wait
Prompt = str | Sequence[int]


class Writer(Protocol):
    """What writes texts: `AsyncClient`, or a `Text` over any transport."""

    def writing(self, prompt: Prompt, options: Options) -> AbstractAsyncContextManager[Writing]: ...


@dataclass(frozen=True, slots=True)
class Piece:
    """A little more of one of the texts; with `finish` the last of it."""

    index: int
    text: str
    finish: str | None = None


class Answers:
    """Texts written at the same time. Iterate once; `close` in any case."""

    def __init__(self, writer: Writer, jobs: Sequence[tuple[Prompt, Options]]) -> None:
        self._queue: asyncio.Queue[Piece | Exception] = asyncio.Queue(_AHEAD)
        self._open = len(jobs)
        self._first: Piece | None = None
        self._prompt_tokens = self._new_tokens = 0
        self._tasks = [
            asyncio.create_task(self._write(writer, index, *job), name="answer")
            for index, job in enumerate(jobs)
        ]

    @property
    def usage(self) -> dict[str, int]:
        """Of all texts, once they are written."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._new_tokens,
            "total_tokens": self._prompt_tokens + self._new_tokens,
        }

    async def begun(self) -> None:
        """Returns when there is a first piece. Raises what writing raised before it."""
        self._first = await self._next()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        """Pieces as they come. Raises what writing raised."""
        while self._open:
            found, self._first = self._first or await self._next(), None
            self._open -= found.finish is not None
            yield found

    async def _next(self) -> Piece:
        found = await self._queue.get()
        if isinstance(found, Exception):
            raise found
        return found

    async def close(self) -> None:
        """Stop whatever is still being written."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _write(self, writer: Writer, index: int, prompt: Prompt, options: Options) -> None:
        try:
            async with writer.writing(prompt, options) as writing:
                async for piece in writing:
                    await self._queue.put(Piece(index, piece.text))
            self._prompt_tokens += writing.prompt_tokens
            self._new_tokens += writing.new_tokens
            await self._queue.put(Piece(index, "", writing.finish))
        except Exception as error:  # the edge of the task: whoever iterates raises it
            await self._queue.put(error)


class CompletionForm:
    """POST /v1/completions."""

    def __init__(self, model: str, created: int) -> None:
        self._base = {"id": f"cmpl-{secrets.token_hex(12)}", "created": created, "model": model}

    def whole(self, texts: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one body."""
        choices = [self._choice(piece) for piece in texts]
        return {**self._base, "object": "text_completion", "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a text before its first piece."""
        return None

    def piece(self, piece: Piece) -> dict[str, Any]:
        """One event of a stream."""
        return {**self._base, "object": "text_completion", "choices": [self._choice(piece)]}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last event of a stream whose caller wants to know."""
        return {**self._base, "object": "text_completion", "choices": [], "usage": usage}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.index, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}


class ChatForm:
    """POST /v1/chat/completions."""

    def __init__(self, model: str, created: int) -> None:
        self._base = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": created, "model": model}

    def whole(self, texts: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        choices = [
            {
                "index": piece.index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": None,
                "finish_reason": piece.finish,
            }
            for piece in texts
        ]
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""}, None)

    def piece(self, piece: Piece) -> dict[str, Any]:
        return self._chunk(piece.index, {"content": piece.text} if piece.text else {}, piece.finish)

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._base, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def _chunk(self, index: int, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._base, "object": "chat.completion.chunk", "choices": [choice]}


Form = CompletionForm | ChatForm


async def whole(form: Form, answers: Answers, count: int) -> dict[str, Any]:
    """All texts, in one body."""
    texts, finishes = [""] * count, [""] * count
    async for piece in answers:
        texts[piece.index] += piece.text
        finishes[piece.index] = piece.finish or finishes[piece.index]
    pieces = [Piece(i, text, finish) for i, (text, finish) in enumerate(zip(texts, finishes, strict=True))]
    return form.whole(pieces, answers.usage)


async def events(form: Form, answers: Answers, count: int, with_usage: bool) -> AsyncIterator[dict[str, Any]]:
    """All texts, piece by piece."""
    for index in range(count):
        if (opening := form.opening(index)) is not None:
            yield opening
    async for piece in answers:
        if piece.text or piece.finish:
            yield form.piece(piece)
    if with_usage:
        yield form.usage(answers.usage)
