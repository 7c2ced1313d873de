"""The try-it box's other half: short texts that the owner's daemon has its swarm write, polled by the page.

    {"do": "generate_start", "prompt": "def ", "tokens": 48, "temperature": 0.7}  ->  {"session": "..."}
    {"do": "generate_more", "session": "..."}  ->  {"text": "add(", "done": false, "note": ""}
    {"do": "generate_stop", "session": "..."}  ->  {}

A text whose reader stays away is given up. The daemon asks as any member would, itself among the servers.
Each text is recomputed by a second chain where there is one (`checks`); a disagreement is an event.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from shoal.node.control import Action
from shoal.node.events import Events
from shoal.node.inference.checking import DISAGREE, in_words
from shoal.node.inference.writing import Options, Text
from shoal.node.presence import Presence
from shoal.node.tokenizers import with_tokenizer
from shoal.protocol.errors import Busy, NetworkError, NotHere, ShoalError, UsageError
from shoal.protocol.identity import Contact, PeerId
from shoal.training.data.tokenizer import load_tokenizer
from shoal.training.neighbours import MemberReplicas
from shoal.training.serving.audit import Auditor, Disagreement, coarsest
from shoal.training.serving.tuner import Tuner
from shoal.training.spec import RunSpec

AT_ONCE = 4
MOST_TOKENS = 1024
PROMPT_CHARACTERS = 16_000
UNREAD_S = 30.0  # a text that nobody asked for in so long a time is dropped


@dataclass
class _Session:
    """One text. `pieces` are those not handed out yet; a text has at most MOST_TOKENS."""

    task: asyncio.Task[None] | None = None
    pieces: list[str] = field(default_factory=list)
    done: bool = False
    note: str = ""
    asked_s: float = 0.0


class Tryouts:
    """Belongs to one daemon. Use as `async with`: its texts end with it."""

    def __init__(self, presence: Presence, events: Events) -> None:
        self._presence, self._events = presence, events
        self._text: Text | None = None
        self._auditor: Auditor | None = None
        self._making = asyncio.Lock()
        self._ending = AsyncExitStack()
        self._sessions: dict[str, _Session] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for session in list(self._sessions):
            await self._drop(session)
        await self._ending.aclose()

    @property
    def checks(self) -> dict[str, int]:
        """How many texts a second chain agreed with, or not, or could not be had for."""
        return self._auditor.figures.counts() if self._auditor is not None else {}

    @property
    def actions(self) -> dict[str, Action]:
        return {"generate_start": self._start, "generate_more": self._more, "generate_stop": self._stop}

    async def _start(self, request: Mapping[str, Any]) -> object:
        prompt, options = _asked(request, self._presence.rng.getrandbits(31))
        await self._drop_unread()
        if len(self._sessions) >= AT_ONCE:
            raise Busy(f"{AT_ONCE} texts are being written already; wait for one to end", UNREAD_S)
        name = secrets.token_hex(8)
        session = self._sessions[name] = _Session(asked_s=_now_s())
        session.task = asyncio.create_task(self._write(session, prompt, options), name=f"try-out {name}")
        return {"session": name}

    async def _more(self, request: Mapping[str, Any]) -> object:
        name = str(request.get("session"))
        session = self._sessions.get(name)
        if session is None:
            raise NotHere("this text is not written any more")
        session.asked_s = _now_s()
        text = "".join(session.pieces)
        session.pieces.clear()
        if session.done:
            await self._drop(name)
        return {"text": text, "done": session.done, "note": session.note}

    async def _stop(self, request: Mapping[str, Any]) -> object:
        await self._drop(str(request.get("session")))
        return {}

    async def _write(self, session: _Session, prompt: str, options: Options) -> None:
        """A task's edge: what goes wrong is told to the reader."""
        begun_s = time.monotonic()
        route: list[str] = []
        try:
            async with (await self._writer()).writing(prompt, options) as writing:
                async for piece in writing:
                    session.pieces.append(piece.text)
                    if all(now := writing.route()):  # they are let go before the last piece
                        route = [self._name(peer) for peer in now]
            seconds = time.monotonic() - begun_s
            session.note = (
                f"{writing.new_tokens} tokens in {seconds:.2f} s, {writing.new_tokens / seconds:.1f} a second"
                f", by {' → '.join(route)}"
            )
        except ShoalError as error:
            session.note = str(error)
        finally:
            session.done = True

    async def _writer(self) -> Text:
        """Made when it is first needed."""
        presence = self._presence
        if presence.spec is None:
            raise NetworkError("this peer does not know the run yet\ntry again in a moment")
        presence.contacts.learn(Contact(presence.transport.me, presence.addresses, presence.membership.chain))
        async with self._making:
            if self._text is None:
                self._text = await self._made(presence, presence.spec.spec)
            return self._text

    async def _made(self, presence: Presence, spec: RunSpec) -> Text:
        local = await with_tokenizer(spec, presence.transport, presence.others())
        tokenizer = await asyncio.to_thread(load_tokenizer, local.data)
        replicas = MemberReplicas(presence.members)
        tuner = Tuner(spec, presence.transport, replicas, presence.rng, offload=asyncio.to_thread)
        auditor = Auditor(tuner, 1.0, presence.rng, self._disagree, coarsest(spec))
        self._auditor = await self._ending.enter_async_context(auditor)
        text = Text(spec, tokenizer, presence.transport, replicas, presence.rng)
        text.auditor = auditor
        return text

    def _disagree(self, found: Disagreement) -> None:
        self._events(DISAGREE, in_words(found, self._presence.members.view(), " of the try-it box"))

    def _name(self, peer: PeerId | None) -> str:
        member = self._presence.members.view().get(peer) if peer else None
        return member.name if member is not None else "somebody"

    async def _drop_unread(self) -> None:
        for name, session in list(self._sessions.items()):
            if _now_s() - session.asked_s > UNREAD_S:
                await self._drop(name)

    async def _drop(self, name: str) -> None:
        session = self._sessions.pop(name, None)
        if session is not None and session.task is not None:
            session.task.cancel()
            await asyncio.gather(session.task, return_exceptions=True)


def _asked(request: Mapping[str, Any], seed: int) -> tuple[str, Options]:
    prompt, tokens = request.get("prompt", ""), request.get("tokens", 64)
    temperature = request.get("temperature", 0.0)
    if not isinstance(prompt, str) or len(prompt) > PROMPT_CHARACTERS:
        raise UsageError(f"a prompt has at most {PROMPT_CHARACTERS} characters here")
    if not isinstance(tokens, int) or not 1 <= tokens <= MOST_TOKENS:
        raise UsageError(f"1 to {MOST_TOKENS} tokens can be asked for here")
    if not isinstance(temperature, int | float) or not 0 <= temperature <= 10:
        raise UsageError("a temperature lies between 0 and 10")
    return prompt, Options(max_new_tokens=tokens, temperature=float(temperature), seed=seed)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
