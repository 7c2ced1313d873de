"""The gateway as programs meet it: the real `openai` package over HTTP, and callers who mean no good.

The swarm behind it is real but small: two stages, two replicas each, on the memory network, in real time.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from serving_world import World, serving_spec

from shoal.node.dashboard import snippets
from shoal.node.gateway.app import BODY_BYTES, REQUESTS, Gateway
from shoal.node.gateway.errors import refusal_of
from shoal.node.gateway.event_stream import UNREAD_S, EventStream
from shoal.node.gateway.server import bind, read_keys, server_of
from shoal.node.inference.writing import Options, Text
from shoal.protocol import virtual_time
from shoal.protocol.errors import Busy, StageEmpty, TransportLost, UsageError
from shoal.training.data.tokenizer import ByteTokenizer

KEY = "a-key-of-the-test"
MODEL = "bytes-1"


class Served:
    """A gateway on loopback, and what tests need to know of it."""

    def __init__(self, world: World, text: Text, port: int) -> None:
        self.world, self.text, self.port = world, text, port
        self.client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=60.0
        )

    async def raw(self, data: bytes) -> tuple[int, dict[str, Any]]:
        """Status and body of whatever bytes one sends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1])
            for line in head.splitlines()
            if line.lower().startswith(b"content-length")
        )
        body = await reader.readexactly(length)
        writer.close()
        return int(head.split()[1]), json.loads(body)

    async def post(self, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, Any]:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return await self.raw(head.encode() + body)


@asynccontextmanager
async def served(stages: int = 2) -> AsyncIterator[Served]:
    async with World(serving_spec(stages), 2, duration_s=0.0) as world:
        text = Text(world.spec, ByteTokenizer(), world.client, world, random.Random(7))
        gateway = Gateway(text, MODEL, 1, lambda: 2.0, (KEY,))
        with bind("127.0.0.1:0", (KEY,)) as bound:
            server: uvicorn.Server = server_of(gateway.app)
            running = asyncio.create_task(server.serve(sockets=[bound]))
            found = Served(world, text, bound.getsockname()[1])
            try:
                yield found
            finally:
                await found.client.close()
                server.should_exit = True
                await running


def told(story: Callable[[Served], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(120), served() as found:
            await story(found)

    asyncio.run(main())


async def written(served: Served, prompt: str, options: Options) -> str:
    """The same text without the gateway."""
    async with served.text.writing(prompt, options) as writing:
        async for _ in writing:
            pass
    return writing.text


# --- what it is for


@pytest.mark.parametrize("prompt", ["once", 'it\'s "5 €"\n$(id) `id`'])
def test_the_snippets_of_the_owners_page_run_as_they_are(prompt: str) -> None:
    async def story(served: Served) -> None:
        here = f"http://127.0.0.1:{served.port}/v1"
        for program in (
            ("bash", "-c", f"{snippets.curl(MODEL, prompt)} -sH 'Authorization: Bearer {KEY}'"),
            (sys.executable, "-c", snippets.python(MODEL, prompt).replace('api_key="-"', f"api_key={KEY!r}")),
        ):
            command = [part.replace(snippets.BASE_URL, here) for part in program]
            running = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            out, _ = await running.communicate()
            assert running.returncode == 0
            if program[0] == "bash":
                assert json.loads(out)["object"] == "text_completion"

    told(story)


def test_completions_are_what_the_swarm_writes_whole_and_in_a_stream() -> None:
    async def story(served: Served) -> None:
        expected = await written(served, "once", Options(max_new_tokens=24))
        asked: dict[str, Any] = {"model": MODEL, "prompt": "once", "max_tokens": 24, "temperature": 0}
        whole = await served.client.completions.create(**asked)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "length")
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (4, 24)
        stream = await served.client.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == 28

    told(story)


def test_a_chat_is_its_turns_as_text_and_stops_where_the_next_one_speaks() -> None:
    async def story(served: Served) -> None:
        messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        prompt = "System: Be brief.\nUser: Hi\nAssistant:"
        expected = await written(served, prompt, Options(max_new_tokens=12, stop=("\nUser:", "\nSystem:")))
        asked: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 12, "temperature": 0}
        whole = await served.client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].message.role == "assistant"
        chunks = [chunk async for chunk in await served.client.chat.completions.create(**asked, stream=True)]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason

    told(story)


def test_choices_differ_and_a_seed_brings_each_of_them_back() -> None:
    async def story(served: Served) -> None:
        asked: dict[str, Any] = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 16, "n": 2, "seed": 5}
        first = await served.client.completions.create(**asked)
        again = await served.client.completions.create(**asked)
        texts = [choice.text for choice in first.choices]
        assert texts == [choice.text for choice in again.choices]
        assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
        assert texts[0] != texts[1]

    told(story)


def test_models_are_listed_and_others_are_not_here() -> None:
    async def story(served: Served) -> None:
        assert [model.id async for model in served.client.models.list()] == [MODEL]
        assert (await served.client.models.retrieve(MODEL)).owned_by == "shoal"
        with pytest.raises(openai.NotFoundError) as refused:
            await served.client.completions.create(model="gpt-5", prompt="x")
        assert refused.value.code == "model_not_found"

    told(story)


# --- what it refuses, in the API's own form


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", "many"),
        ("prompt", "x" * 300),  # this model takes 127
        ("prompt", []),
        ("prompt", [[1, 999_999]]),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("n", 1000),
        ("stop", ["a"] * 9),
        ("logit_bias", {"x": 1.0}),
        ("logprobs", 5),
        ("suffix", "end"),
    ],
)
def test_a_field_out_of_bounds_is_named(field: str, value: object) -> None:
    async def story(served: Served) -> None:
        body = {"model": MODEL, "prompt": "x", "max_tokens": 4, field: value}
        status, answer = await served.post("/v1/completions", json.dumps(body).encode())
        assert status == 400, answer
        error = answer["error"]
        assert error["type"] == "invalid_request_error"
        assert field in (error["param"] or "") or error["code"] == "invalid_value"
        assert error["message"]

    told(story)


def test_strangers_and_bodies_that_are_none_are_refused() -> None:
    async def story(served: Served) -> None:
        stranger = served.client.with_options(api_key="guessed")
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()
        assert (await served.post("/v1/completions", b"{"))[0] == 400
        assert (await served.post("/v1/completions", b"[" * 100_000))[0] == 400
        assert (await served.post("/v1/completions", b"[]"))[0] == 400
        assert (await served.post("/v1/completions", b"{}", "text/plain"))[0] == 415
        status, answer = await served.post("/v1/completions", b"x" * (BODY_BYTES + 1))
        assert (status, answer["error"]["type"]) == (413, "invalid_request_error")
        status, answer = await served.post("/v1/embeddings", b"{}")
        assert (status, answer["error"]["code"]) == (404, "unknown_url")

    told(story)


def test_a_stream_that_cannot_begin_has_a_status_of_its_own() -> None:
    async def story(served: Served) -> None:
        asked: dict[str, Any] = {"model": MODEL, "prompt": "x" * 300, "stream": True}
        with pytest.raises(openai.BadRequestError):
            await served.client.completions.create(**asked)
        bias = {"model": MODEL, "prompt": "x", "logit_bias": {"\ud800": 1000}}
        assert (await served.post("/v1/completions", json.dumps(bias).encode()))[0] == 400

    told(story)


def test_without_keys_a_page_under_another_name_is_refused() -> None:
    """DNS rebinding: a name of somebody else that points to this machine."""

    async def story(served: Served) -> None:
        gateway = Gateway(served.text, MODEL, 1, lambda: 2.0)
        with bind("127.0.0.1:0", ()) as bound:
            server = server_of(gateway.app)
            running = asyncio.create_task(server.serve(sockets=[bound]))
            keyless = Served(served.world, served.text, bound.getsockname()[1])
            for host, status in (("evil.example", 403), ("127.0.0.1:1", 200), ("localhost", 200)):
                found, _ = await keyless.raw(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
                assert found == status, host
            await keyless.client.close()
            server.should_exit = True
            await running

    told(story)


def test_more_requests_than_are_served_at_once_are_told_to_wait_and_the_others_finish() -> None:
    async def story(served: Served) -> None:
        servers = [peer.name for peer in served.world.peers]
        served.world.hidden.update(servers)  # requests wait for a stage
        asked: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 2}
        waiting = [asyncio.create_task(served.client.completions.create(**asked)) for _ in range(REQUESTS)]
        while (await served.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))[1]["requests"] < REQUESTS:
            await asyncio.sleep(0.01)
        with pytest.raises(openai.RateLimitError) as refused:
            await served.client.completions.create(**asked)
        assert refused.value.response.headers["retry-after"] == "1"
        served.world.hidden.clear()
        assert all(len(done.choices[0].text) >= 0 for done in await asyncio.gather(*waiting))
        assert (await served.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))[1]["requests"] == 0

    told(story)


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_who_leaves_takes_the_session_along(stream: bool) -> None:
    async def story(served: Served) -> None:
        served.world.hidden.update(peer.name for peer in served.world.peers)
        body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 100, "stream": stream}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        writer.write(body)
        health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        while (await served.raw(health))[1]["requests"] == 0:
            await asyncio.sleep(0.01)
        writer.close()
        while (await served.raw(health))[1]["requests"]:
            await asyncio.sleep(0.01)

    told(story)


def test_who_never_reads_is_cut_off_and_what_was_written_for_him_given_up() -> None:
    """Without a socket: what a full one does is not to return from `send`."""
    closed: list[float] = []
    made = 0

    async def events() -> AsyncIterator[dict[str, Any]]:
        nonlocal made
        while True:
            made += 1
            yield {"text": "x"}

    async def main() -> None:
        sent = 0

        async def send(message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent > 4:
                await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def close() -> None:
            closed.append(asyncio.get_running_loop().time())

        begun_s = asyncio.get_running_loop().time()
        await EventStream(events(), close)({"type": "http"}, receive, send)
        closed.append(asyncio.get_running_loop().time() - begun_s)

    virtual_time.run(main)
    assert made == 4
    assert closed[1] == pytest.approx(UNREAD_S)


def test_full_and_empty_come_with_the_time_to_wait() -> None:
    busy = refusal_of(Busy("full", retry_after_s=2.5))
    assert (busy.status, busy.headers) == (429, {"retry-after": "3"})
    empty = refusal_of(StageEmpty("stage 1 has nobody"))
    assert (empty.status, "retry-after" in empty.headers) == (503, True)


# --- where it listens


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.1:x", ":8000", "127.0.0.1:70000"])
def test_an_address_that_is_none_is_refused(listen: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        bind(listen, ())


def test_without_keys_only_this_machine_may_call() -> None:
    with pytest.raises(UsageError, match="--api-key-file"):
        bind("0.0.0.0:0", ())
    bind("0.0.0.0:0", (KEY,)).close()


def test_a_port_in_use_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(TransportLost, match="in use"):
        bind(f"127.0.0.1:{taken.getsockname()[1]}", ())


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("one # of Ann\n\n# nobody\ntwo\n")
    path.chmod(0o600)
    return path


def test_keys_are_read_a_line_each_from_a_file_of_ones_own(key_file: Path) -> None:
    assert read_keys(key_file) == ("one", "two")
    assert read_keys(None) == ()
    key_file.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        read_keys(key_file)
    key_file.chmod(0o600)
    key_file.write_text("# none\n")
    with pytest.raises(UsageError, match="no key"):
        read_keys(key_file)
    with pytest.raises(UsageError, match="cannot read"):
        read_keys(key_file.with_name("absent"))
