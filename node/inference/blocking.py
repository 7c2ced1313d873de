"""The client without asyncio: the same calls, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, overload

from shoal.node.inference.client import AsyncClient, Completion, Options, Turn
from shoal.node.inference.writing import Text
from shoal.protocol.admission import JoinToken
from shoal.training.serving.tuner import Tuner

T = TypeVar("T")


class Client:
    """Use as `with Client(token) as client:`; raises what `AsyncClient` raises."""

    def __init__(
        self,
        join: str | JoinToken,
        *,
        data_dir: Path | None = None,
        timeout_s: float | None = None,
        verify: float = 0.0,
        draft: Path | None = None,
    ) -> None:
        self._client = AsyncClient(join, data_dir=data_dir, timeout_s=timeout_s, verify=verify, draft=draft)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="shoal client", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self.wait(self._client.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.wait(self._client.__aexit__(*error))
        finally:
            self._stop()

    @overload
    def generate(
        self, prompt: str, options: Options | None = None, *, timeout_s: float | None = None
    ) -> Completion: ...

    @overload
    def generate(
        self, prompt: list[str], options: Options | None = None, *, timeout_s: float | None = None
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: str | list[str],
        options: Options | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Completion | list[Completion]:
        """A whole text, or one for each prompt."""
        if isinstance(prompt, str):
            return self.wait(self._client.generate(prompt, options, timeout_s=timeout_s))
        return self.wait(self._client.generate(prompt, options, timeout_s=timeout_s))

    def stream(self, prompt: str, options: Options | None = None) -> Iterator[str]:
        """The text as it comes; closing the iterator ends it."""
        pieces = self._client.stream(prompt, options)
        try:
            while (text := self.wait(_next(pieces))) is not None:
                yield text
        finally:
            self.wait(pieces.aclose())

    def chat(
        self, turns: Sequence[Turn], options: Options | None = None, *, timeout_s: float | None = None
    ) -> Completion:
        """The assistant's next turn."""
        return self.wait(self._client.chat(turns, options, timeout_s=timeout_s))

    def route(self) -> list[str | None]:
        """The servers of the text that was begun last, by stage."""
        return self._client.route()

    def standby(self) -> list[str | None]:
        """Those that take over where one of them fails."""
        return self._client.standby()

    def status(self) -> dict[str, object]:
        """The run and who serves it."""
        return self._client.status()

    @property
    def text(self) -> Text:
        """What writes, for programs that bring their own `wait`."""
        return self._client.text

    @property
    def model(self) -> str:
        """The run's name."""
        return self._client.model

    @property
    def tuner(self) -> Tuner:
        """What forwards and tunes."""
        return self._client.tuner

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine that runs on the client's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(pieces: AsyncGenerator[str, None]) -> str | None:
    return await anext(pieces, None)
