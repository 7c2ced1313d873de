"""A program's way into a swarm: joins with an inference token, writes, leaves.

    async with AsyncClient(token) as client:
        print((await client.generate("def ", Options(max_new_tokens=32))).text)
        async for text in client.stream("def "):
            print(text, end="")

Called by `shoal generate`, `shoal chat` and the gateway; `blocking.Client` is the same without asyncio.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self, overload

from shoal.node.inference.checking import DISAGREE, in_words, telling_owners
from shoal.node.inference.writing import Options, Piece, Text, Writing
from shoal.node.paths import PeerFolder, data_root, run_folder
from shoal.node.presence import Listening, Presence, present
from shoal.node.tokenizers import with_tokenizer
from shoal.node.view.buffer import Buffer
from shoal.protocol.admission import JoinToken
from shoal.protocol.errors import NetworkError, UsageError
from shoal.protocol.identity import PeerKey
from shoal.training.data.tokenizer import Tokenizer, load_tokenizer
from shoal.training.lane import ThreadLane
from shoal.training.neighbours import MemberReplicas
from shoal.training.serving.audit import Auditor, Disagreement, coarsest
from shoal.training.serving.draft import DraftModel, load_draft
from shoal.training.serving.tuner import Tuner
from shoal.training.spec import RunSpec

__all__ = ["AsyncClient", "Completion", "Options", "Piece", "Text", "Turn", "Writing"]
_SWARM_S = 20.0  # to see a replica of every stage
_log = logging.getLogger(__name__)
_AT_ONCE = 32  # texts of one batch


@dataclass(frozen=True, slots=True)
class Completion:
    """What was written."""

    prompt: str
    text: str
    finish: str  # "stop" or "length"
    prompt_tokens: int
    tokens: int
    seconds: float
    drafted: int = 0  # tokens that a draft guessed ...
    accepted: int = 0  # ... and of them those that were right

    def to_json(self) -> dict[str, object]:
        return {
            "prompt": self.prompt,
            "text": self.text,
            "finish": self.finish,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "drafted": self.drafted,
            "accepted": self.accepted,
        }


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a chat."""

    role: str  # "system", "user" or "assistant"
    text: str


class AsyncClient:
    """One member of the swarm that only asks. Use as `async with`; texts may be written side by side."""

    def __init__(
        self,
        join: str | JoinToken,
        *,
        data_dir: Path | None = None,
        timeout_s: float | None = None,
        verify: float = 0.0,
        draft: Path | None = None,
    ) -> None:
        """`timeout_s`: for a whole text, where a call does not say another. `verify`: share of the texts that
        a second chain recomputes; `status()["checks"]` and the run's owners tell. `draft`: folder of a
        small model in the Llama layout that guesses ahead, for the same texts in less time.
        Raises TokenInvalid, UsageError."""
        if not 0.0 <= verify <= 1.0:
            raise UsageError(f"verify = {verify}: a share lies between 0 and 1")
        self._token = JoinToken.parse(join.strip()) if isinstance(join, str) else join
        self._data_dir, self._timeout_s, self._verify = data_dir, timeout_s, verify
        self._draft = draft
        self._stack = AsyncExitStack()
        self._presence: Presence | None = None
        self._text: Text | None = None
        self._tuner: Tuner | None = None
        self._auditor: Auditor | None = None
        self._told: Buffer | None = None  # what the run's owners are told
        self._last: Writing | None = None

    async def __aenter__(self) -> Self:
        """Join. Raises AccessError, BootstrapFailed, NetworkError, StorageError, SpecError and UsageError."""
        async with self._stack:
            draft = await self._load_draft()
            root = await asyncio.to_thread(data_root, self._data_dir)
            folder = self._stack.enter_context(await asyncio.to_thread(PeerFolder.claim, root))
            key = await asyncio.to_thread(PeerKey.load_or_create, folder.identity_path)
            own_folder = run_folder(folder.path, self._token.run_id)
            joining = present(self._token, key, own_folder, Listening(), name="client")
            presence = await self._stack.enter_async_context(joining)
            presence.state = "observing"
            spec = (await presence.learn_spec(own_folder)).spec
            stages = range(spec.stages.count)
            await presence.members.wait_for(
                lambda view: all(view.online(stage) for stage in stages), _SWARM_S
            )
            self._stack.push_async_callback(presence.members.leave, "done")
            local = await with_tokenizer(spec, presence.transport, presence.others())
            tokenizer = await asyncio.to_thread(load_tokenizer, local.data)
            replicas = MemberReplicas(presence.members)
            self._text = Text(spec, tokenizer, presence.transport, replicas, presence.rng, draft)
            self._tuner = Tuner(spec, presence.transport, replicas, presence.rng, offload=asyncio.to_thread)
            auditor = Auditor(self._tuner, self._verify, presence.rng, self._disagree, coarsest(spec))
            self._auditor = await self._stack.enter_async_context(auditor)
            if self._verify:
                told = telling_owners(presence, auditor.figures.counts)
                self._told = await self._stack.enter_async_context(told)
            self._text.auditor = auditor
            self._presence = presence
            self._stack = self._stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _load_draft(self) -> DraftModel | None:
        if self._draft is None:
            return None
        spec, weights = await asyncio.to_thread(load_draft, self._draft)
        lane = ThreadLane("draft")
        self._stack.push_async_callback(lane.close)
        return DraftModel(spec, weights, lane)

    @property
    def text(self) -> Text:
        """What writes. Raises UsageError before the client is entered."""
        if self._text is None:
            raise UsageError("the client has not joined; use it as: async with AsyncClient(...) as client")
        return self._text

    @property
    def tuner(self) -> Tuner:
        """What forwards and tunes. Raises UsageError before the client is entered."""
        if self._tuner is None:
            raise UsageError("the client has not joined; use it as: async with AsyncClient(...) as client")
        return self._tuner

    @property
    def spec(self) -> RunSpec:
        return self.text.spec

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer

    @property
    def model(self) -> str:
        """The run's name."""
        return self.spec.run.name

    def writing(self, prompt: str | Sequence[int], options: Options | None = None) -> Writing:
        """A text, piece by piece: `async with`, then `async for`.

        Raises UsageError, at the latest once it is entered.
        """
        self._last = self.text.writing(prompt, options or Options())
        return self._last

    @overload
    async def generate(
        self, prompt: str, options: Options | None = None, *, timeout_s: float | None = None
    ) -> Completion: ...

    @overload
    async def generate(
        self, prompt: list[str], options: Options | None = None, *, timeout_s: float | None = None
    ) -> list[Completion]: ...

    async def generate(
        self,
        prompt: str | list[str],
        options: Options | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Completion | list[Completion]:
        """A whole text, or one for each prompt, written side by side.

        Raises NetworkError after `timeout_s`, UsageError, StageEmpty, Busy; to cancel, cancel the task.
        """
        limit_s = timeout_s if timeout_s is not None else self._timeout_s
        try:
            async with asyncio.timeout(limit_s):
                if isinstance(prompt, str):
                    return await self._complete(prompt, options)
                slots = asyncio.Semaphore(_AT_ONCE)

                async def one(text: str) -> Completion:
                    async with slots:
                        return await self._complete(text, options)

                async with asyncio.TaskGroup() as tasks:
                    each = [tasks.create_task(one(text)) for text in prompt]
                return [task.result() for task in each]
        except TimeoutError:
            raise NetworkError(f"the text was not written within {limit_s} s") from None
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def stream(self, prompt: str, options: Options | None = None) -> AsyncGenerator[str, None]:
        """The text as it comes."""
        async with self.writing(prompt, options) as writing:
            async for piece in writing:
                if piece.text:
                    yield piece.text

    async def chat(
        self, turns: Sequence[Turn], options: Options | None = None, *, timeout_s: float | None = None
    ) -> Completion:
        """The assistant's next turn; the transcript goes to the model as plain text."""
        prompt, options = transcript(turns, options or Options())
        return await self.generate(prompt, options, timeout_s=timeout_s)

    def route(self) -> list[str | None]:
        """The servers of the text that was begun last, by stage."""
        return list(self._last.route()) if self._last is not None else []

    def standby(self) -> list[str | None]:
        """Those that take over where one of them fails; no server of the route where the swarm has others."""
        return list(self._last.standby()) if self._last is not None else []

    def status(self) -> dict[str, object]:
        """The run and who serves it, JSON-able."""
        if self._presence is None:
            raise UsageError("the client has not joined")
        view = self._presence.members.view()
        return {
            "run": self.spec.run.name,
            "run_id": self._token.run_id.hex(),
            "sequence": self.spec.model.sequence,
            "stages": [
                [{"peer": one.peer, "name": one.name, "rtt_s": one.rtt_s} for one in view.online(stage)]
                for stage in range(self.spec.stages.count)
            ],
            "route": self.route(),
            "standby": self.standby(),
            "checks": self._auditor.status() if self._auditor is not None else {},
        }

    def _disagree(self, found: Disagreement) -> None:
        _log.warning("two chains disagree: %s", json.dumps(found.to_json()))
        if self._told is not None and self._presence is not None:
            self._told.add(DISAGREE, in_words(found, self._presence.members.view()))

    async def _complete(self, prompt: str, options: Options | None) -> Completion:
        begun_s = time.monotonic()
        async with self.writing(prompt, options) as writing:
            async for _ in writing:
                pass
        return Completion(
            prompt,
            writing.text,
            writing.finish,
            writing.prompt_tokens,
            writing.new_tokens,
            round(time.monotonic() - begun_s, 3),
            writing.figures.drafted,
            writing.figures.accepted,
        )


def transcript(turns: Sequence[Turn], options: Options) -> tuple[str, Options]:
    """A chat as one text that the assistant continues, and options that stop it where its turn ends."""
    named = {"system": "System", "user": "User", "assistant": "Assistant"}
    if unknown := [turn.role for turn in turns if turn.role not in named]:
        raise UsageError(f"no turn of a chat has the role {unknown[0]!r}; there are {', '.join(named)}")
    lines = "".join(f"{named[turn.role]}: {turn.text}\n" for turn in turns)
    values = {**vars(options), "stop": (*options.stop, "\nUser:", "\nSystem:")}
    return f"{lines}Assistant:", Options(**values)
