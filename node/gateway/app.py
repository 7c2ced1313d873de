"""The gateway's end points: /v1/models, /v1/completions, /v1/chat/completions, and /health.

Everything is refused in the API's own form: who gives no key, another model's name, a body too large or too
slow, a field out of bounds, more requests at once than are served. Made by `server`.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from shoal.node.gateway.answers import Answers, ChatForm, CompletionForm, Form, Prompt, Writer, events, whole
from shoal.node.gateway.errors import Refusal, refusal_of
from shoal.node.gateway.event_stream import EventStream
from shoal.node.gateway.requests import ANSWERS, SEED_MOST, ChatRequest, CompletionRequest, Sampled, parse
from shoal.node.inference.client import transcript
from shoal.node.inference.writing import Options
from shoal.protocol.errors import ShoalError

T = TypeVar("T")
BODY_BYTES = 1 << 20
BODY_S = 10.0  # to send it in
REQUESTS = 64  # answered at once
_OWN_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
COMPLETION_TOKENS, CHAT_TOKENS = 16, 512  # where the caller sets no bound; the first is OpenAI's


class Gateway:
    """The application over something that writes. `keys`: those that callers may show; none: all may call."""

    def __init__(
        self, writer: Writer, model: str, created: int, clock: Callable[[], float], keys: Sequence[str] = ()
    ) -> None:
        self._writer = writer
        self._model = model
        self._created = created
        self._clock = clock
        self._keys = [key.encode() for key in keys]
        self._under_way = 0
        self.app = Starlette(
            routes=[
                Route("/health", self._guarded(self._health)),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{model:path}", self._guarded(self._one_model)),
                Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _unknown},
        )

    # -- end points

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "requests": self._under_way})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Request) -> Response:
        self._require_model(request.path_params["model"])
        return JSONResponse(self._card())

    async def _completions(self, request: Request) -> Response:
        asked: CompletionRequest = parse(await _body(request), CompletionRequest)
        options = asked.options(asked.max_tokens or COMPLETION_TOKENS)
        form = CompletionForm(self._model, int(self._clock()))
        return await self._answer(request, form, asked, asked.prompts, options)

    async def _chat(self, request: Request) -> Response:
        asked: ChatRequest = parse(await _body(request), ChatRequest)
        options = asked.options(asked.max_completion_tokens or asked.max_tokens or CHAT_TOKENS)
        prompt, options = transcript([message.turn for message in asked.messages], options)
        form = ChatForm(self._model, int(self._clock()))
        return await self._answer(request, form, asked, [prompt], options)

    async def _answer(
        self, request: Request, form: Form, asked: Sampled, prompts: Sequence[Prompt], options: Options
    ) -> Response:
        self._require_model(asked.model)
        count = len(prompts) * (asked.n or 1)
        if count > ANSWERS:
            raise Refusal(400, f"{count} texts at once; at most {ANSWERS}", "n")
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        wanted = [prompt for prompt in prompts for _ in range(asked.n or 1)]
        # The choices of one request differ; with a seed, each is the same every time.
        jobs = [(p, replace(options, seed=seed + number & SEED_MOST)) for number, p in enumerate(wanted)]
        if self._under_way >= REQUESTS:
            raise Refusal(
                429, f"{REQUESTS} requests are being answered; try again", code="busy", retry_after_s=1.0
            )
        self._under_way += 1
        answers = Answers(self._writer, jobs)
        streams = False
        try:
            if not asked.stream:
                return JSONResponse(await _unless_left(request, whole(form, answers, count)))
            await _unless_left(request, answers.begun())  # what fails until then has a status of its own
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            stream = EventStream(events(form, answers, count, with_usage), lambda: self._done(answers))
            streams = True
            return stream  # type: ignore[return-value]  # an ASGI application, as routes may return
        finally:
            if not streams:
                await self._done(answers)

    async def _done(self, answers: Answers) -> None:
        self._under_way -= 1
        await answers.close()

    # -- what every end point begins with

    def _guarded(
        self, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                self._require_key(request)
                return await answer(request)
            except (Refusal, ShoalError) as error:
                refusal = refusal_of(error) if isinstance(error, ShoalError) else error
                return JSONResponse(refusal.body, refusal.status, refusal.headers)

        return guarded

    def _require_key(self, request: Request) -> None:
        if not self._keys:  # a page whose name was made to point here must not speak for this machine
            name = re.sub(r":\d+$", "", request.headers.get("host", "").lower())
            if name not in _OWN_NAMES:
                raise Refusal(403, "without API keys only this machine may call, by its own name")
            return
        if request.url.path == "/health":
            return
        shown = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not any([hmac.compare_digest(shown, key) for key in self._keys]):
            raise Refusal(401, "no API key, or one that is not known here", code="invalid_api_key")

    def _require_model(self, name: str) -> None:
        if name != self._model:
            text = f"no model {name[:80]!r} here; this swarm serves {self._model!r}"
            raise Refusal(404, text, "model", "model_not_found")

    def _card(self) -> dict[str, object]:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "shoal"}


async def _body(request: Request) -> bytes:
    """The whole body. A page on another site cannot send this type unasked, so it is demanded."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body has to be application/json")
    taken = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for piece in request.stream():
                taken += piece
                if len(taken) > BODY_BYTES:
                    raise Refusal(413, f"a body of more than {BODY_BYTES} bytes")
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {BODY_S:g} s") from None
    except ClientDisconnect:
        raise Refusal(400, "the caller left") from None
    return bytes(taken)


async def _unless_left(request: Request, answer: Coroutine[Any, Any, T]) -> T:
    """The answer, given up when its caller goes away."""
    writing = asyncio.create_task(answer, name="writing")
    leaving = asyncio.create_task(_left(request), name="caller leaves")
    try:
        await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            raise Refusal(400, "the caller left")
        return writing.result()
    finally:
        for task in (writing, leaving):
            task.cancel()
        await asyncio.gather(writing, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unknown(request: Request, error: Exception) -> Response:
    """Other paths and methods."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    refusal = Refusal(
        status, f"{request.method} {request.url.path[:80]} is not served here", code="unknown_url"
    )
    return JSONResponse(refusal.body, refusal.status)
