"""Everything that reaches the page passes here first; what it lets through comes from the owner's browser.

An ASGI application around the page's. In this order: the host header (against DNS rebinding), the size of
bodies, the origin of whatever could act (posts and websockets), the session. Static files need a session as
well: only the login page, which is text and nothing else, does not. Called by `server`.
"""

from __future__ import annotations

import asyncio
import fnmatch
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.node.dashboard.answers import answer, with_nonce
from shoal.node.dashboard.login_page import login_page
from shoal.node.dashboard.refusals import Bucket, Refusals
from shoal.node.dashboard.sessions import SESSION_S, Sessions

BODY_BYTES = 64 * 1024
BODY_S = 10.0  # for it to come
WEBSOCKETS = 24  # three browsers with a few tabs each
LOGIN_BURST, LOGINS_PER_S = 10, 0.5
WEBSOCKET_PATH = "/_nicegui_ws/"
_METHODS = {"GET", "HEAD", "POST"}
_NEED_LINK = "Open the link that the daemon printed, or make a new one on its machine with: shoal dashboard"

Redeem = Callable[[str], Awaitable[bool]]


class Guard:
    """See the module. `names`: hosts, besides IP addresses and localhost, under which it may be asked."""

    def __init__(
        self,
        app: ASGIApp,
        sessions: Sessions,
        redeem: Redeem,
        refusals: Refusals,
        clock: Callable[[], float],
        *,
        names: Collection[str] = (),
        secure: bool = False,
        port: int = 0,
    ) -> None:
        self._app, self._sessions, self._redeem, self._refusals = app, sessions, redeem, refusals
        self._names, self._secure = names, secure
        self._cookie = f"__Host-shoal-{port}" if secure else f"shoal-{port}"  # a host's ports share cookies
        self._logins = Bucket(clock, LOGIN_BURST, LOGINS_PER_S)
        self._websockets: dict[int, bytes] = {}  # open ones -> session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._request(scope, receive, send)

    # --- requests

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        method, path = scope["method"], scope["path"]
        if not self._known_host(headers.get("host", "")):
            return await self._refuse(scope, send, 421, "a host name that is not this page's")
        if method not in _METHODS:
            return await self._refuse(scope, send, 405, "a method that the page does not know")
        if _length(headers) > BODY_BYTES:
            return await self._refuse(scope, send, 413, "a body that is too long")
        if method == "POST" and not _same_origin(headers):
            return await self._refuse(scope, send, 403, "a post from another origin")
        if path == "/login":
            return await self._login(scope, receive, send)
        session = self._session(headers)
        if session is None:
            if self._cookie in headers.get("cookie", ""):
                self._refusals.note("a forged or expired cookie", _who(scope))
            if method == "GET" and path == "/":
                return await answer(send, 303, "", {"location": "/login"})
            return await answer(send, 401, f"Sign in first. {_NEED_LINK}")
        if path == "/logout" and method == "POST":
            self._sessions.end(session)
            return await answer(send, 303, "", {"location": "/login", "set-cookie": self._set_cookie("", 0)})
        if path.startswith(WEBSOCKET_PATH):  # long polling would pass the cap on websockets by
            return await self._refuse(scope, send, 400, "long polling")
        scope["shoal_session"] = session
        nonce = secrets.token_urlsafe(16)
        await self._app(scope, _capped(receive), with_nonce(send, nonce, self._secure))

    async def _login(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            code = parse_qs(scope["query_string"].decode("latin-1")).get("code", [""])[0]
            nonce = secrets.token_urlsafe(16)
            return await answer(send, 200, login_page(code, nonce), html=True, nonce=nonce)
        if not self._logins.take():
            return await self._refuse(scope, send, 429, "a login, as there were too many")
        body = await _body(receive)
        if body is None:
            return await self._refuse(scope, send, 413, "a body that is too long")
        code = parse_qs(body.decode("latin-1")).get("code", [""])[0]
        if not await self._redeem(code):
            self._refusals.note("a login link that is wrong, used or too old", _who(scope))
            nonce = secrets.token_urlsafe(16)
            page = login_page("", nonce, "This link is wrong, was used before, or is older than an hour.")
            return await answer(send, 403, page, html=True, nonce=nonce)
        cookie = self._set_cookie(self._sessions.begin(), int(SESSION_S))
        await answer(send, 303, "", {"location": "/", "set-cookie": cookie})

    # --- websockets

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        session = self._session(headers)
        if not self._known_host(headers.get("host", "")) or not _same_origin(headers):
            return await self._close(scope, receive, send, "a websocket from another origin")
        if session is None or not scope["path"].startswith(WEBSOCKET_PATH):
            return await self._close(scope, receive, send, "a websocket without a session")
        if len(self._websockets) >= WEBSOCKETS:
            return await self._close(scope, receive, send, "a websocket, as there were too many")
        number = id(scope)
        self._websockets[number] = session
        scope["shoal_session"] = session
        try:
            await self._app(scope, self._while_signed_in(receive, scope), send)
        finally:
            del self._websockets[number]

    def _while_signed_in(self, receive: Receive, scope: Scope) -> Receive:
        """A session that ended hears nothing more from its websockets."""
        headers = Headers(scope=scope)

        async def receive_checked() -> Message:
            message = await receive()
            if message["type"] == "websocket.receive" and self._session(headers) is None:
                return {"type": "websocket.disconnect", "code": 1008}
            return message

        return receive_checked

    async def _close(self, scope: Scope, receive: Receive, send: Send, kind: str) -> None:
        self._refusals.note(kind, _who(scope))
        await receive()  # websocket.connect
        await send({"type": "websocket.close", "code": 1008})  # before accepting: a 403

    # --- what is let in

    def _session(self, headers: Headers) -> bytes | None:
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return None
        found = cookies.get(self._cookie)
        return None if found is None else self._sessions.check(found.value)

    def _known_host(self, header: str) -> bool:
        """An IP address is nobody's to rebind; a name has to be ours."""
        try:
            host = urlsplit(f"//{header}").hostname or ""
            ipaddress.ip_address(host)
        except ValueError:
            host = header.rpartition(":")[0] if ":" in header else header
            return host == "localhost" or any(
                fnmatch.fnmatchcase(host.lower(), name)
                and ("*" not in name or host.count(".") == name.count("."))
                for name in self._names
            )
        return True

    def _set_cookie(self, value: str, seconds: int) -> str:
        secure = "; Secure" if self._secure else ""
        return f"{self._cookie}={value}; Path=/; HttpOnly; SameSite=Strict; Max-Age={seconds}{secure}"

    async def _refuse(self, scope: Scope, send: Send, status: int, kind: str) -> None:
        self._refusals.note(kind, _who(scope))
        await answer(send, status, f"Refused: {kind}.", {"connection": "close"})


def _same_origin(headers: Headers) -> bool:
    """Browsers name the origin of every post and websocket; who names none is no browser of the owner's."""
    try:
        return bool(headers.get("host")) and urlsplit(headers.get("origin", "")).netloc == headers["host"]
    except ValueError:
        return False


def _length(headers: Headers) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else BODY_BYTES + 1


async def _body(receive: Receive) -> bytes | None:
    """The whole body, None if it is longer than allowed, or takes longer."""
    body = b""
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                body += bytes(message.get("body", b""))
                if len(body) > BODY_BYTES:
                    return None
                if not message.get("more_body", False):
                    return body
    except TimeoutError:
        return None


def _capped(receive: Receive) -> Receive:
    """A body without a length is cut off where the cap is."""
    taken = 0

    async def receive_capped() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return message if taken <= BODY_BYTES else {"type": "http.disconnect"}

    return receive_capped


def _who(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "somebody"
