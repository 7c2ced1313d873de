"""What the page's own process refuses: each as an attacker would send it, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from dashboard_world import FakeDaemon, full_snapshot, served
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from shoal.node.dashboard.address import DashboardOptions, dashboard_options
from shoal.node.dashboard.child import CRASHES, Dashboard, dashboard
from shoal.node.dashboard.guard import LOGIN_BURST, WEBSOCKETS
from shoal.node.dashboard.logins import LINK_S, LoginCodes
from shoal.node.dashboard.refusals import EVERY_S, Bucket, Refusals
from shoal.node.dashboard.server import CONNECTIONS
from shoal.node.dashboard.sessions import SESSION_S, Sessions, session_key
from shoal.protocol.errors import StorageError, UsageError
from shoal.protocol.virtual_time import run

SOCKET = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket&client_id=x"


class World:
    """One page process on one loop; `cookie` is a good session's."""

    def __init__(self, folder: Path) -> None:
        self.daemon = FakeDaemon(full_snapshot())
        self.runner = asyncio.Runner()
        self._stack = contextlib.AsyncExitStack()
        self.runner.run(self._start(folder))

    async def _start(self, folder: Path) -> None:
        self.log, self.begun_s = folder / "page.log", time.monotonic()
        with errors_to(self.log):  # its process inherits them
            self.link = await self._stack.enter_async_context(served(folder, self.daemon))
            await self._sign_in()

    async def _sign_in(self) -> None:
        self.base, self.code = self.link.split("/login?code=")
        self.host = self.base.removeprefix("http://")
        async with self.client() as client:
            self.looked = [await client.get(f"/login?code={self.code}") for _ in range(2)]
            self.signed_in = await client.post("/login", data={"code": self.code}, headers=self.own)
            self.again = await client.post("/login", data={"code": self.code}, headers=self.own)
        self.cookie = self.signed_in.headers["set-cookie"].partition(";")[0]

    @property
    def own(self) -> dict[str, str]:
        """What the owner's browser says of where a request comes from."""
        return {"origin": self.base}

    def client(self, cookie: str = "") -> httpx.AsyncClient:
        headers = {"cookie": cookie} if cookie else {}
        return httpx.AsyncClient(base_url=self.base, headers=headers, timeout=20)

    async def websocket(self, cookie: str, origin: str | None) -> ClientConnection:
        extra = {"cookie": cookie} if cookie else {}
        url = f"ws://{self.host}{SOCKET}"
        return await connect(url, additional_headers=extra, origin=origin, proxy=None)  # type: ignore[arg-type]

    def refusals(self) -> Counter[str]:
        """How often the page's log names each kind."""
        lines = [line for line in self.log.read_text().splitlines() if "refused " in line]
        return Counter(line.partition("refused ")[2].rpartition(", from ")[0] for line in lines)

    def process(self) -> psutil.Process:
        children = psutil.Process().children()
        return next(child for child in children if "shoal.node.dashboard" in " ".join(child.cmdline()))

    def close(self) -> None:
        self.runner.run(self._stack.aclose())
        self.runner.close()


@contextlib.contextmanager
def errors_to(path: Path) -> Iterator[None]:
    """Where standard error of processes that start meanwhile goes."""
    kept = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("page"))
    yield world
    world.close()


def test_a_link_signs_in_once_and_looking_at_it_spends_nothing(world: World) -> None:
    assert [answer.status_code for answer in world.looked] == [200, 200]
    assert world.signed_in.status_code == 303
    told = world.signed_in.headers["set-cookie"]
    assert "HttpOnly" in told and "SameSite=Strict" in told and "Path=/" in told
    assert world.again.status_code == 403 and "set-cookie" not in world.again.headers


def test_the_secrets_stand_in_no_argument_and_no_environment(world: World) -> None:
    process = world.process()
    exposed = " ".join(process.cmdline()) + str(process.environ())
    assert world.code not in exposed
    assert "torch" not in " ".join(found.path for found in process.memory_maps())


def test_without_a_session_there_is_nothing_but_the_login(world: World) -> None:
    async def story() -> None:
        async with world.client() as client:
            page = await client.get("/")
            assert page.status_code == 303 and page.headers["location"] == "/login"
            for path in ("/_nicegui/3.18.0/static/nicegui.js", "/docs", "/openapi.json", "/../etc/passwd"):
                assert (await client.get(path)).status_code == 401
            assert (await client.request("DELETE", "/")).status_code == 405

    world.runner.run(story())


def test_forged_and_altered_cookies_are_refused(world: World) -> None:
    name, _, value = world.cookie.partition("=")
    strange = Sessions(bytes(32), lambda: 0.0).begin()
    altered = ("A" if value[0] != "A" else "B") + value[1:]
    forged = [strange, altered, value[:-4], value + "AAAA", "", "x" * 5000]

    async def story() -> None:
        for one in forged:
            async with world.client(f"{name}={one}") as client:
                assert (await client.get("/")).status_code == 303, one
            with pytest.raises(InvalidStatus) as refused:
                await world.websocket(f"{name}={one}", world.base)
            assert refused.value.response.status_code == 403
        async with world.client(world.cookie) as client:
            assert (await client.get("/")).status_code == 200

    world.runner.run(story())


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "", "http://localhost:1"])
def test_other_origins_neither_post_nor_open_websockets(world: World, origin: str) -> None:
    async def story() -> None:
        async with world.client(world.cookie) as client:
            headers = {"origin": origin} if origin else {}
            for path in ("/login", "/logout", "/", "/_nicegui/upload"):
                assert (await client.post(path, headers=headers)).status_code == 403
            assert (await client.get("/")).status_code == 200, "nobody was signed out"
        with pytest.raises(InvalidStatus) as refused:
            await world.websocket(world.cookie, origin or None)
        assert refused.value.response.status_code == 403

    world.runner.run(story())


def test_a_name_that_was_rebound_to_this_address_is_refused(world: World) -> None:
    async def story() -> None:
        async with world.client(world.cookie) as client:
            for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "", "localhost.evil"):
                assert (await client.get("/", headers={"host": host})).status_code == 421, host
            port = world.host.rpartition(":")[2]
            assert (await client.get("/", headers={"host": f"localhost:{port}"})).status_code == 200

    world.runner.run(story())


def test_a_page_forbids_scripts_and_hosts_that_are_not_its_own(world: World) -> None:
    async def story() -> None:
        async with world.client(world.cookie) as client:
            page = await client.get("/")
        policy = page.headers["content-security-policy"]
        nonce = re.search(r"'nonce-([\w-]+)'", policy)
        assert nonce is not None and "default-src 'none'" in policy and "http" not in policy
        assert "'unsafe-inline'" not in policy.partition("style-src")[0]
        assert page.headers["x-frame-options"] == "DENY"
        scripts = re.findall(r"<script[^>]*>", page.text)
        assert scripts and all(f'nonce="{nonce[1]}"' in script for script in scripts)
        assert "https://" not in re.sub(r"<!--.*?-->|https://(quasar|www\.w3)\S*", "", page.text)

    world.runner.run(story())


def test_ten_megabytes_are_refused_before_they_are_kept(world: World) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(160):
            yield bytes(1 << 16)

    async def story() -> None:
        before = world.process().memory_info().rss
        async with world.client(world.cookie) as client:
            for path in ("/", "/login"):
                for content in (bytes(10_000_000), pieces()):
                    with contextlib.suppress(httpx.NetworkError):  # cut off in the middle, or told
                        answer = await client.post(path, content=content, headers=world.own)
                        assert answer.status_code in (405, 413)
            assert (await client.get("/")).status_code == 200
        assert world.process().memory_info().rss - before < 8 << 20

    world.runner.run(story())


def test_a_thousand_idle_websockets_and_connections_leave_room_for_the_owner(world: World) -> None:
    async def story() -> None:
        async def stranger() -> int:
            try:
                await world.websocket("", world.base)
            except InvalidStatus as refused:
                return refused.response.status_code
            return 101

        assert {await stranger() for _ in range(20)} == {403}
        found = [await asyncio.gather(*(stranger() for _ in range(100))) for _ in range(10)]
        assert {status for some in found for status in some} == {403}

        async with contextlib.AsyncExitStack() as stack:
            for _ in range(WEBSOCKETS):
                await stack.enter_async_context(await world.websocket(world.cookie, world.base))
            with pytest.raises(InvalidStatus):
                await world.websocket(world.cookie, world.base)

        host, _, port = world.host.rpartition(":")
        idle = [await asyncio.open_connection(host, int(port)) for _ in range(CONNECTIONS + 50)]
        for _, writer in idle[::2]:  # some have asked once, and keep their connection
            writer.write(b"GET /login HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with world.client(world.cookie) as client:
            assert (await client.get("/")).status_code == 200
        for _, writer in idle:
            writer.close()

    world.runner.run(story())


def test_a_session_that_signed_out_is_over(world: World) -> None:
    async def story() -> None:
        code = (await world.daemon.page_link()).partition("code=")[2]
        async with world.client() as client:
            told = await client.post("/login", data={"code": code}, headers=world.own)
            cookie = told.headers["set-cookie"].partition(";")[0]
        async with world.client(cookie) as client:
            assert (await client.get("/")).status_code == 200
            assert (await client.post("/logout", headers=world.own)).status_code == 303
            assert (await client.get("/")).status_code == 303

    world.runner.run(story())


def test_a_hundred_logins_a_second_reach_the_daemon_a_few_times(world: World) -> None:
    async def story() -> None:
        before = world.daemon.logins
        async with world.client() as client:
            posts = (
                client.post("/login", data={"code": f"wrong-{n}"}, headers=world.own) for n in range(100)
            )
            answers = await asyncio.gather(*posts)
            assert {answer.status_code for answer in answers} <= {403, 429}
            assert sum(answer.status_code == 429 for answer in answers) > 100 - LOGIN_BURST - 10
        assert world.daemon.logins - before <= LOGIN_BURST + 10
        async with world.client(world.cookie) as client:
            assert (await client.get("/")).status_code == 200

    world.runner.run(story())


def test_every_kind_of_attack_is_logged_once_and_has_no_effect(world: World) -> None:
    async def story() -> None:
        name = world.cookie.partition("=")[0]
        for _ in range(20):
            async with world.client(f"{name}=forged") as stranger, world.client(world.cookie) as owner:
                await stranger.get("/")
                await owner.post("/logout", headers={"origin": "https://evil.example"})
                await owner.post("/", headers=world.own, content=bytes(70_000))
                await owner.get("/", headers={"host": "evil.example"})
                await stranger.post("/login", data={"code": "guessed"}, headers=world.own)
            for cookie, origin in ((world.cookie, "https://evil.example"), ("", world.base)):
                with pytest.raises(InvalidStatus):
                    await world.websocket(cookie, origin)
        async with world.client(world.cookie) as owner:
            assert (await owner.get("/")).status_code == 200

    world.runner.run(story())
    found = world.refusals()
    assert found.keys() >= {
        "a forged or expired cookie",
        "a post from another origin",
        "a body that is too long",
        "a host name that is not this page's",
        "a login, as there were too many",
        "a websocket from another origin",
        "a websocket without a session",
    }
    minutes = 1 + (time.monotonic() - world.begun_s) / EVERY_S  # again after a minute, as a number
    assert max(found.values()) <= minutes, found
    assert not world.daemon.did and not world.daemon.tokens, "nothing was ordered"


def test_a_crashed_page_comes_back_and_nobody_has_to_sign_in_again(world: World) -> None:
    async def story() -> None:
        old = world.process()
        old.send_signal(signal.SIGKILL)
        async with world.client(world.cookie) as client:  # waits in the listening socket meanwhile
            assert (await client.get("/")).status_code == 200
        assert world.process().pid != old.pid
        assert "dashboard-restarted" in [kind for kind, _ in world.daemon.events]

    world.runner.run(story())


# --- the parts, on a clock of the test's


@pytest.mark.parametrize("cannot_begin", [False, True])
def test_a_page_that_always_crashes_is_left_alone_until_somebody_wants_it(
    tmp_path: Path, cannot_begin: bool
) -> None:
    """Where it could not begin, for want of memory say, the owner's peer ended with it."""

    class Crashing(Dashboard):
        async def _once(self) -> int:
            if cannot_begin:
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            return 1

    async def story() -> list[str]:
        told: list[str] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            options = DashboardOptions(host="127.0.0.1", port=0)
            page = Crashing(options, listener, tmp_path, lambda kind, _: told.append(kind))
            running = asyncio.create_task(page.run())
            await asyncio.sleep(3600)
            assert told == ["dashboard-link", *["dashboard-restarted"] * (CRASHES - 1), "dashboard-down"]
            await page.actions["dashboard_link"]({})
            await asyncio.sleep(3600)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        return told

    assert run(story).count("dashboard-down") == 2


def test_a_refusal_is_logged_once_and_the_rest_as_a_number(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    refusals = Refusals(lambda: now)
    with caplog.at_level(logging.WARNING, "shoal.dashboard"):
        for _ in range(1000):
            refusals.note("a forged cookie", "10.0.0.1")
        assert [record.getMessage() for record in caplog.records] == [
            "refused a forged cookie, from 10.0.0.1"
        ]
        now = EVERY_S
        refusals.note("a forged cookie", "10.0.0.1")
    assert caplog.records[-1].getMessage().endswith("999 more since the last line")


def test_codes_are_good_once_and_for_an_hour() -> None:
    now = 0.0
    codes = LoginCodes(lambda: now)
    first, second = codes.issue(), codes.issue()
    assert codes.redeem(first) and not codes.redeem(first)
    assert not codes.redeem("") and not codes.redeem(None) and not codes.redeem("é")
    now = LINK_S + 1
    assert not codes.redeem(second)


def test_sessions_end_by_time_and_by_signing_out() -> None:
    now = 0.0
    sessions = Sessions(bytes(32), lambda: now)
    cookie = sessions.begin()
    session = sessions.check(cookie)
    assert session is not None
    now = SESSION_S + 1
    assert sessions.check(cookie) is None
    now = 0.0
    sessions.end(session)
    assert sessions.check(cookie) is None


def test_the_session_key_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert session_key(path) == session_key(path)
    path.chmod(0o644)
    with pytest.raises(StorageError):
        session_key(path)


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    now = 0.0
    bucket = Bucket(lambda: now, 3, 0.5)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now = 2.0
    assert [bucket.take() for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    "address", ["8080", "nowhere:80", "127.0.0.1:99999", "127.0.0.1:", ":80", "1.2.3.4:x"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match=r"like 127\.0\.0\.1:8080"):
        dashboard_options(address, None, False)


def test_other_machines_get_the_page_over_tls_or_when_forced() -> None:
    with pytest.raises(UsageError, match="--dashboard-tls"):
        dashboard_options("0.0.0.0:8080", None, False)
    assert dashboard_options("0.0.0.0:8080", None, True).host == "0.0.0.0"
    assert dashboard_options("[::1]:0", None, False).host == "::1"
    with pytest.raises(UsageError, match="no certificate with its key"):
        dashboard_options("0.0.0.0:8080", (Path("/nowhere"), Path("/nowhere")), False)


def test_an_address_in_use_is_refused_when_the_daemon_starts(tmp_path: Path) -> None:
    async def story() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            options = DashboardOptions(host="127.0.0.1", port=other.getsockname()[1])
            with pytest.raises(UsageError, match="name another port"):
                async with dashboard(options, tmp_path / "control.sock", lambda kind, fields: None):
                    pass

    asyncio.run(story())


def test_over_tls_the_cookie_is_for_tls_alone_and_the_certificate_names_the_host(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "1",
            "-subj",
            "/CN=x",
            "-addext",
            "subjectAltName=DNS:swarm.example",
            "-keyout",
            str(key),
            "-out",
            str(certificate),
        ],
        check=True,
        capture_output=True,
    )
    options = dashboard_options("127.0.0.1:0", (certificate, key), False)
    assert isinstance(options, DashboardOptions)

    async def story() -> None:
        async with served(tmp_path, FakeDaemon(full_snapshot()), options) as link:
            base, code = link.split("/login?code=")
            assert base.startswith("https://swarm.example:")
            base = base.replace("swarm.example", "127.0.0.1")  # where that name would lead
            port = base.rpartition(":")[2]
            named = {"host": f"swarm.example:{port}", "origin": f"https://swarm.example:{port}"}
            async with httpx.AsyncClient(base_url=base, verify=False, timeout=20) as client:
                told = await client.post("/login", data={"code": code}, headers=named)
                assert told.status_code == 303
                assert (
                    told.headers["set-cookie"].startswith("__Host-")
                    and "; Secure" in told.headers["set-cookie"]
                )
                other = await client.get("/login", headers={"host": "other.example"})
                assert other.status_code == 421

    asyncio.run(story())
