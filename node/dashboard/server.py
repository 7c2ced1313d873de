"""The page's process: guard, page and feed put together over one listening socket. Called by `__main__`."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from nicegui import ui
from starlette.middleware.gzip import GZipMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from shoal.node.control import ask
from shoal.node.dashboard.address import certificate_names
from shoal.node.dashboard.feed import Feed
from shoal.node.dashboard.guard import BODY_BYTES, Guard
from shoal.node.dashboard.page import build_page
from shoal.node.dashboard.refusals import Refusals
from shoal.node.dashboard.sessions import Sessions, session_key
from shoal.node.open_files import raise_file_limit
from shoal.protocol.errors import PeerUnreachable

KEY_FILE = "dashboard.key"
CONNECTIONS = 256
FIRST_REQUEST_S = 10.0  # a connection that has asked nothing by then is closed
_HEADER_BYTES = 16 * 1024


async def serve(listener: socket.socket, control: Path, tls: tuple[Path, Path] | None) -> None:
    """Until a signal says stop. Raises StorageError for a session key that is not ours alone."""
    raise_file_limit()
    clock = asyncio.get_running_loop().time
    key = await asyncio.to_thread(session_key, control.parent / KEY_FILE)
    feed = Feed(control)

    async def redeem(code: str) -> bool:
        try:
            return bool((await ask(control, "dashboard_login", code=code))["right"])
        except PeerUnreachable:
            return False

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    build_page(feed)
    ui.run_with(
        app,
        title="Shoal",
        tailwind=False,
        gzip_middleware_factory=None,
        show_welcome_message=False,
        favicon=ICON,
        reconnect_timeout=10.0,
        message_history_length=100,
        language="en-US",
    )
    guard = Guard(
        app,
        Sessions(key, time.time),
        redeem,
        Refusals(clock),
        clock,
        names=() if tls is None else await asyncio.to_thread(certificate_names, tls[0]),
        secure=tls is not None,
        port=listener.getsockname()[1],
    )
    config = uvicorn.Config(
        GZipMiddleware(guard, minimum_size=1000),
        http=_ImpatientProtocol,
        ws="websockets-sansio",
        ws_max_size=BODY_BYTES,
        ws_ping_interval=20.0,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=1,
        server_header=False,
        proxy_headers=False,
        access_log=False,
        log_config=None,
        ssl_certfile=None if tls is None else tls[0],
        ssl_keyfile=None if tls is None else tls[1],
    )
    following = asyncio.create_task(feed.run(), name="follow the daemon")
    try:
        await uvicorn.Server(config).serve(sockets=[listener])
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


class _ImpatientProtocol(H11Protocol):
    """Closes connections that ask nothing: in time, and at once where somebody else needs the place."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._made_at = self.loop.time()
        if len(self.connections) > CONNECTIONS:
            idle = [one for one in self.connections if isinstance(one, _ImpatientProtocol) and one._idle]
            min(idle, key=lambda one: one._made_at).transport.abort()  # this one at least is idle
        self.loop.call_later(FIRST_REQUEST_S, self._give_up)

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _give_up(self) -> None:
        if self.cycle is None and self in self.connections:
            self.transport.abort()


ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" '
    'fill="#0b6b7c"/><path d="M5 11q6-5 13 0l5-3v6l-5-3q-7 5-13 0zm4 11q6-5 13 0l5-3v6l-5-3q-7 5-13 0z" '
    'fill="#fff"/></svg>'
)
